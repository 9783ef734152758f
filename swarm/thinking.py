"""Thinking together: a question goes to the organism that its words surprise least, or all answer it as one."""

from __future__ import annotations

import contextlib
import os
import time
from typing import Any

import numpy as np

from organism import OrganismError
from swarm.ensemble import Mixer
from swarm.mesh import Letter, Mesh
from swarm.reading import END, unpacked
from swarm.rules import by_surprise, worth_waking
from swarm.summary import Summary

MANY = 8  # organisms that are asked at a time
QUESTION_BYTES, ANSWER_BYTES = 400, 240  # of the ensemble at most
MIN_P = 0.06  # of the likeliest byte's probability, below which none is drawn
QUICK = 0.001  # seconds between two looks for answers of the ensemble
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

    def answers(self, awaited: set[int], seconds: float, pause: float = 0.02) -> dict[int, Letter]:
        """The answers to these letters, by the letter's id; one whose reader died is answered by "undelivered"."""
        until, found, looked = time.monotonic() + seconds, {}, 0.0
        while len(found) < len(awaited) and time.monotonic() < until:
            letters = self.mesh.inbox(self.id)
            self.mesh.settle([letter.id for letter in letters])
            for letter in letters:
                to = letter.payload["to"] if letter.kind == "answer" else letter.payload["letter"]
                if to in awaited:
                    found[to] = letter
            if not letters and time.monotonic() - looked > 0.2:
                self.mesh.peers(living=True)  # notices who died, and returns the letters they took
                looked = time.monotonic()
            time.sleep(0.0 if letters else pause)
        return found


def ask(mesh: Mesh, text: str) -> dict[str, Any]:
    """The answer of the organism with the lowest surprise a byte, with everybody's surprise. If it dies over the question,
    the next one is asked. Raises OrganismError where nobody answers.

    Where more than MANY listen, only those that their summaries say would be least surprised are asked how surprised they are.
    Who hibernates is not woken for that: see `worth_waking`.
    """
    with Correspondent(_asked(mesh, text)) as me:
        awake, asleep, guesses = _listeners(mesh, text)
        known = _surprises(me, awake, text)
        keen = {
            peer.id: peer.facts["keen"] for peer in mesh.peers() if isinstance(peer.facts.get("keen"), (int, float))
        }
        for id in [*worth_waking(known, asleep, guesses), *by_surprise(known, keen)]:
            letter = me.send(id, "ask", text=text)
            answer = me.answers({letter}, REPLY_SECONDS).get(letter)
            if answer is not None and answer.kind == "answer" and "error" not in answer.payload:
                return dict(
                    answer.payload, source="peer", id=id, bits_per_byte=known.get(id, guesses.get(id)), surprises=known
                )
    raise _nobody()


def _asked(mesh: Mesh, text: str) -> Mesh:
    if not text.strip():
        raise OrganismError("There is nothing to ask: TEXT is empty.")
    return mesh


def _nobody() -> OrganismError:
    return OrganismError(
        "Nobody in the colony answers: `organism swarm status` shows who lives, `organism swarm up` starts it."
    )


def _listeners(mesh: Mesh, text: str) -> tuple[list[str], list[str], dict[str, float]]:
    """(who is awake, who hibernates, bits a byte by their summaries), of those that answer for others. At most MANY that are
    awake, the least surprised; without need, no summary is read."""
    peers = [peer for peer in mesh.peers() if peer.facts.get("answers")]
    awake = [peer.id for peer in peers if peer.listens]
    asleep = [peer.id for peer in peers if peer.status == "asleep" and peer.facts.get("hibernating")]
    if len(awake) <= MANY and not asleep:
        return awake, asleep, {}
    guesses = {}
    for id in (*awake, *asleep):
        with contextlib.suppress(OrganismError):
            if blob := mesh.blob(id, "summary"):
                guesses[id] = Summary.from_blob(blob).bits_per_byte(text.encode("utf-8", "replace"))
    return sorted(awake, key=lambda id: guesses.get(id, 0.0))[:MANY], asleep, guesses


def _surprises(me: Correspondent, ids: list[str], text: str) -> dict[str, float]:
    """Bits a byte that each says the text would cost it; who does not say in time is left out."""
    asked = {me.send(id, "surprise", text=text): id for id in ids}
    heard = {
        asked[k]: letter.payload.get("bits_per_byte") for k, letter in me.answers(set(asked), LOOK_SECONDS).items()
    }
    return {id: float(bits) for id, bits in heard.items() if isinstance(bits, (int, float))}


# --- The ensemble. ---


def ensemble(mesh: Mesh, text: str, temperature: float = 0.7, seed: int | None = None) -> dict[str, Any]:
    """One answer of all, byte by byte: each says how likely each next byte is, and a `Mixer` that has learned from the bytes
    of the question weighs them. Who dies or is late meanwhile is left out. Raises OrganismError where nobody answers.

    {"text", "source": "ensemble", "shares": of each in the end, "bytes", "seconds", "bits_per_byte": of the question}.
    """
    began, rng = time.perf_counter(), np.random.default_rng(seed)
    prompt = f"H: {' '.join(text.split())[-QUESTION_BYTES:]}\nA:"
    with Correspondent(_asked(mesh, text)) as me:
        ids, _, _ = _listeners(mesh, text)
        chorus = Chorus(me, ids, prompt)
        said = bytearray()
        while chorus.ids and len(said) < ANSWER_BYTES:
            symbol = chosen(chorus.mix(), rng, temperature, may_end=bool(said.strip()))
            if symbol in (END, 10):
                break
            said.append(symbol)
            chorus.go_on(symbol)
        if not chorus.ids:
            raise _nobody()
        shares = dict(zip(chorus.ids, chorus.mixer.shares.round(4).tolist()))
    return dict(text=said.decode("utf-8", "ignore").strip(), source="ensemble", shares=shares, bytes=len(said),
                bits_per_byte=chorus.bits / len(prompt.encode()), seconds=time.perf_counter() - began)  # fmt: skip


class Chorus:
    """Those that read along, and the mixer of what they say."""

    def __init__(self, me: Correspondent, ids: list[str], prompt: str):
        self.me, data = me, prompt.encode("utf-8", "replace")
        heard = {
            id: rows
            for id, rows in self._hear(ids, REPLY_SECONDS, "read", text=prompt).items()
            if len(rows) == len(data) + 1
        }
        self.ids, self.mixer, self.bits = list(heard), Mixer(max(1, len(heard))), 0.0
        for at, byte in enumerate(data if heard else b""):
            self.mixer.mix([rows[at] for rows in heard.values()])
            self.bits += self.mixer.learn(byte)
        self.rows = [rows[-1] for rows in heard.values()]

    def mix(self) -> np.ndarray:
        """Distribution of the next byte, float64 [257]."""
        return self.mixer.mix(self.rows)

    def go_on(self, byte: int) -> None:
        """Everybody reads one more byte."""
        heard = self._hear(self.ids, LOOK_SECONDS, "next", byte=byte)
        for at in reversed([at for at, id in enumerate(self.ids) if id not in heard]):
            del self.ids[at]
            self.mixer.leave(at)
        self.rows = [heard[id][0] for id in self.ids]

    def _hear(self, ids: list[str], seconds: float, kind: str, **payload: Any) -> dict[str, np.ndarray]:
        """What each answers, float64 [n, 257]; without who answers nonsense, an error or nothing."""
        asked, found = {self.me.send(id, kind, **payload): id for id in ids}, {}
        for letter, answer in sorted(self.me.answers(set(asked), seconds, QUICK).items()):
            with contextlib.suppress(KeyError, ValueError, TypeError):
                found[asked[letter]] = unpacked(answer.payload["p"])
        return found


def chosen(p: np.ndarray, rng: np.random.Generator, temperature: float, may_end: bool) -> int:
    """A symbol drawn from float64 [257] after temperature and min-p; 0: the likeliest. The end of the text and of the line
    only where it may."""
    p = p.copy()
    if not may_end:
        p[[END, 10]] = 0.0
    if temperature == 0:
        return int(p.argmax())
    p[p < MIN_P * p.max()] = 0.0
    p **= 1 / temperature
    return int(rng.choice(len(p), p=p / p.sum()))
