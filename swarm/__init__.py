"""Colonies: many organisms as processes that find each other in a mesh, answer together, teach and make each other.

The public face: `open_mesh` and `Mesh` (who is there, letters, offers), `Member` (an organism's life in a mesh). What a
command needs (colony, nursery, thinking, ensemble, topology) is imported by that command.
"""

from __future__ import annotations

from swarm.mesh import Letter, Mesh, MeshError, Offer, Peer, default_mesh, open_mesh

__all__ = ["Letter", "Mesh", "MeshError", "Offer", "Peer", "default_mesh", "open_mesh"]
