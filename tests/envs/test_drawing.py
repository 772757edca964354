"""Pictures are drawn quickly without a graphics card, and are still pictures."""

import numpy as np

from envs import EnvOptions, make
from envs.drawing import is_software


def test_renderers_without_a_card_are_known_by_their_names():
    assert is_software("llvmpipe (LLVM 15.0.6, 256 bits)")
    assert is_software("softpipe")
    assert not is_software("NVIDIA H200/PCIe/SSE2")
    assert not is_software("")


def test_the_camera_follows_the_runner():
    """The cheetah's orange is in the picture although it is far from where it started."""

    def orange(venv):
        picture = venv.get_images()[0].astype(int)
        return (picture[..., 0] - picture[..., 2] > 50).mean()

    venv = make("HalfCheetah-v5", 1, seed=0, options=EnvOptions(render_mode="rgb_array"))
    venv.reset()
    at_home = orange(venv)
    world = venv.envs[0].unwrapped
    world.data.qpos[0] += 100.0
    venv.step(np.zeros((1, 6), dtype=np.float32))
    assert orange(venv) > 0.5 * at_home > 0.01
    venv.close()


def test_a_mujoco_world_draws_what_happens():
    venv = make("InvertedPendulum-v5", 1, seed=0, options=EnvOptions(render_mode="rgb_array"))
    venv.reset()
    first = venv.get_images()[0]
    for _ in range(5):
        venv.step(np.ones((1, 1), dtype=np.float32))
    later = venv.get_images()[0]
    assert first.dtype == np.uint8
    assert first.std() > 10  # not a blank
    assert np.abs(first.astype(int) - later.astype(int)).max() > 50  # the cart moved
    venv.close()
