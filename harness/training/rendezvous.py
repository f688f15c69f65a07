"""Where the ranks of one expert meet: a store of the first rank, on the address that Ray uses."""

import os
import socket

import psutil
import ray
import torch.distributed as dist


def open_rendezvous(ranks: int) -> dist.TCPStore:
    """Open the store, at a port that nobody else can take in between.

    It is bound to the node's address: PyTorch alone would listen on all addresses.
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
    """Open a connection to the first rank's store."""
    _use_address_of_ray()
    return dist.TCPStore(host, port, ranks, is_master=False)


def _use_address_of_ray() -> str:
    """Let gloo and NCCL use the network that Ray uses; returns this node's address in it.

    They would look the host's name up, and find another network or none.
    """
    address: str = ray.util.get_node_ip_address()
    for interface, addresses in psutil.net_if_addrs().items():
        if any(found.address == address for found in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", interface)
    return address
