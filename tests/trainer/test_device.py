"""Which device a configuration names, alone and among several processes, and which errors mean a lost process."""

import pytest
import torch
from torch import distributed as dist

from trainer.config.schema import ConfigError
from trainer.loop.distributed import is_lost
from trainer.policy.device import NoGpuError, pick_device


@pytest.mark.parametrize("name", ["meta", "mps", "xpu", "toaster"])
def test_only_a_cpu_and_cuda_are_devices(name):
    with pytest.raises(ConfigError, match=f"model.device {name} is not a device that is supported. Use auto, cpu or c"):
        pick_device(name)


@pytest.mark.parametrize(("name", "device"), [("auto", "cuda"), ("cuda:1", "cuda:1"), ("cpu", "cpu")])
def test_one_process_may_take_any_gpu(name, device, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert pick_device(name, gpus=2) == torch.device(device)
    with pytest.raises(ConfigError, match=r"model.device is cuda:2, but PyTorch finds only cuda:0, cuda:1\."):
        pick_device("cuda:2", gpus=2)


@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_without_a_gpu_only_the_cpu_is_left(name):
    assert pick_device("auto", gpus=0) == torch.device("cpu")
    with pytest.raises(NoGpuError, match=f"model.device is {name}, but PyTorch finds no GPU"):
        pick_device(name, gpus=0)


def test_several_processes_do_not_share_a_named_gpu(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert pick_device("cuda", gpus=2) == pick_device("auto", gpus=2) == torch.device("cuda")
    with pytest.raises(ConfigError, match=r"reward.device is cuda:1, but 2 processes were started.* Use cuda or auto"):
        pick_device("cuda:1", "reward.device", gpus=2)


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (RuntimeError("[../gloo/transport/tcp/pair.cc] Read error [127.0.0.1]:1: Connection reset by peer"), True),
        (RuntimeError("[enforce fail at gloo/allreduce.cc] op.preamble.length <= op.nbytes. 8 vs 4"), False),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (dist.DistBackendError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"), False),
        (dist.DistBackendError("NCCL error: invalid usage. Duplicate GPU detected"), False),
        (dist.DistNetworkError("The client socket has failed to connect"), True),
        (RuntimeError("CUDA out of memory"), False),
    ],
)
def test_only_the_message_of_a_lost_process_blames_another_one(error, lost):
    assert is_lost(error) == lost
