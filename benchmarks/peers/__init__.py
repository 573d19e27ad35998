"""Ours and what it is compared with, a file each."""

from __future__ import annotations

from peers.base import Peer
from peers.mlx_sdpa import MlxSdpa
from peers.onnx_runtime import OnnxRuntime
from peers.open_vino import OpenVino
from peers.ours import Ours, Reference
from peers.pytorch import PyTorch

ALL: tuple[type[Peer], ...] = (Ours, MlxSdpa, Reference, PyTorch, OnnxRuntime, OpenVino)
PEERS = tuple(peer.name for peer in ALL[1:])
TITLES = {peer.name: peer.title for peer in ALL}


def make_peers(threads: int) -> dict[str, Peer]:
    return {peer.name: peer(threads) for peer in ALL}
