"""Thinking together: a question goes to the organism that its words surprise least."""

from __future__ import annotations

import os
import time
from typing import Any

from organism import OrganismError
from swarm.mesh import Letter, Mesh

LOOK_SECONDS = 5.0  # for all to say how surprised they are; who is late is left out
REPLY_SECONDS = 120.0


class Correspondent:
    """Somebody who writes letters without being an organism: a command. Its letters are withdrawn when it is done."""

    def __init__(self, mesh: Mesh):
        self.mesh, self.id = mesh, f"command-{os.urandom(6).hex()}"
        self._sent: set[int] = set()

    def __enter__(self) -> Correspondent:
        return self

    def __exit__(self, *_: object) -> None:
        self.mesh.withdraw(self.id, self._sent)
        self.mesh.settle([letter.id for letter in self.mesh.inbox(self.id, 10_000)])

    def send(self, to: str, kind: str, **payload: Any) -> int:
        letter = self.mesh.post(self.id, to, kind, payload)
        self._sent.add(letter)
        return letter

    def answers(self, awaited: set[int], seconds: float) -> dict[int, Letter]:
        """The answers to these letters, by the letter's id; one whose reader died is answered by "undelivered"."""
        until, found = time.monotonic() + seconds, {}
        while len(found) < len(awaited) and time.monotonic() < until:
            letters = self.mesh.inbox(self.id)
            self.mesh.settle([letter.id for letter in letters])
            for letter in letters:
                to = letter.payload["to"] if letter.kind == "answer" else letter.payload["letter"]
                if to in awaited:
                    found[to] = letter
            if not letters:
                self.mesh.peers(living=True)  # notices who died, and returns the letters they took
                time.sleep(0.02)
        return found


def ask(mesh: Mesh, text: str) -> dict[str, Any]:
    """The answer of the organism with the lowest surprise a byte, with everybody's surprise. If it dies over the question,
    the next one is asked. Raises OrganismError where nobody answers."""
    if not text.strip():
        raise OrganismError("There is nothing to ask: TEXT is empty.")
    with Correspondent(mesh) as me:
        listeners = [peer.id for peer in mesh.peers(living=True) if peer.listens and peer.facts.get("answers")]
        asked = {me.send(id, "surprise", text=text): id for id in listeners}
        heard = me.answers(set(asked), LOOK_SECONDS)
        surprises = {asked[k]: letter.payload.get("bits_per_byte") for k, letter in heard.items()}
        known = {id: bits for id, bits in surprises.items() if isinstance(bits, (int, float))}
        for id in sorted(known, key=known.__getitem__):
            letter = me.send(id, "ask", text=text)
            answer = me.answers({letter}, REPLY_SECONDS).get(letter)
            if answer is not None and answer.kind == "answer" and "error" not in answer.payload:
                return dict(answer.payload, source="peer", id=id, bits_per_byte=known[id], surprises=known)
    raise OrganismError(
        "Nobody in the colony answers: `organism swarm status` shows who lives, `organism swarm up` starts it."
    )
