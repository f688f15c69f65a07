"""The registry: every expert of one base, as immutable objects and numbered manifests."""

from harness.registry.registry import Registry

__all__ = ["Registry"]
