"""ComfyUI nodes of PCPO: a schema and a short execute() each; host/ holds what depends on ComfyUI's internals."""

import sys

from comfy_api.latest import ComfyExtension, io

from .compare import Compare
from .guidance import ImplicitRewardNode, IRGGuiderNode, IRGKSampler
from .model import LoadTinyModel, Prompts
from .rewards import CombineRewards, LoadReward, ScoreImages
from .runs import LoadRun, PlotRun
from .sampling import PCPOKSampler, PCPOSampler, PlotCredit
from .taste import CompareBlind, HumanVoteNode, LoadTaste, TrainTaste
from .training import TrainLoRA

NODES: list[type[io.ComfyNode]] = [
    LoadTinyModel,
    Prompts,
    LoadReward,
    CombineRewards,
    ScoreImages,
    TrainLoRA,
    PlotRun,
    LoadRun,
    Compare,
    PCPOSampler,
    PCPOKSampler,
    PlotCredit,
    ImplicitRewardNode,
    IRGGuiderNode,
    IRGKSampler,
    HumanVoteNode,
    TrainTaste,
    LoadTaste,
    CompareBlind,
]


class PCPOExtension(ComfyExtension):
    async def on_load(self) -> None:
        from .files import register_folders

        register_folders()
        if "server" in sys.modules:  # ComfyUI runs as a server, and has a page in which a person can be asked
            from .host.booth import register_routes

            register_routes()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> PCPOExtension:
    return PCPOExtension()
