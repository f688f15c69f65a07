"""Folders on shared storage: local paths and object stores."""

from harness.storage.folder import Folder

__all__ = ["Folder"]
