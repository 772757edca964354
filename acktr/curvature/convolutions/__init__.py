"""What convolutions allow beyond treating their patches as rows."""
