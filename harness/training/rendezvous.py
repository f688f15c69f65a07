"""The rendezvous of an expert's ranks: a store on the first rank, at the address that Ray uses."""

import os
import socket

import psutil
import ray
import torch.distributed as dist


def open_rendezvous(ranks: int) -> dist.TCPStore:
    """Open the store, at a port that no other process can take in between.

    The port is bound to the node's address. PyTorch by itself would listen on all addresses.
    """
    address = _use_address_of_ray()
    listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    listener.bind((address, 0))
    listener.listen()
    port = listener.getsockname()[1]
    return dist.TCPStore(
        address,
        port,
        ranks,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def join_rendezvous(host: str, port: int, ranks: int) -> dist.TCPStore:
    """Connect to the first rank's store."""
    _use_address_of_ray()
    return dist.TCPStore(host, port, ranks, is_master=False)


def _use_address_of_ray() -> str:
    """Let gloo and NCCL use the network that Ray uses; return this node's address in it.

    By default they look up the host's name, and may find another network or none.
    """
    address: str = ray.util.get_node_ip_address()
    for interface, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    return address
