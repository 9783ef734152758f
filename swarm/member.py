"""An organism's life in a mesh: it registers, says every two seconds that it lives, and answers what it is asked.

A chat runs a `Member` in a thread of its own, which lists it and tells how surprising a text is to it. In a colony the
process does nothing else (`Member.run`), and there it also answers questions, learns what it is sent and goes to sleep.

What syntropy proposes happens here. To divide: in a colony the supervisor is asked, and starts the child whose home appears;
elsewhere the child is a process of the parent's own (swarm/family.py). To hibernate: in a colony the process ends, and the
supervisor keeps its bed; elsewhere it stops learning, gives back the trainer's memory, and says so.
"""

from __future__ import annotations

import logging
import math
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from organism import Appetites, Organism, OrganismError, close_holes, export_gamma
from swarm.family import Family
from swarm.mesh import ANSWERS, HEARTBEAT, OFFER_BYTES, SUPERVISOR, Letter, Mesh, MeshError, open_mesh
from swarm.metabolism import LEAST, MOST
from swarm.reading import ByteReader, bits_of, packed
from swarm.rules import worth_giving
from swarm.summary import NEWEST, Summary
from swarm.topology import gamma_blob

log = logging.getLogger("organism.swarm")
TICK = 0.1  # seconds between two looks into the inbox
QUICK_TICK = 0.002  # while somebody reads along byte by byte
QUICK_SECONDS = 2.0  # since they last asked
SURPRISE_BYTES = 400  # of a question that are looked at: about a millisecond each
READERS = 4  # that one may have at a time; who has not asked for longest makes room
SUMMARY_SECONDS = 60.0  # between two summaries
EXCHANGE = 60.0  # seconds between two gifts
GIFT_BYTES = 4096  # of a gift at most
GAMMA_STRENGTH = 0.1  # of somebody else's gamma that is tried


def surprise_per_byte(life: Organism, text: str) -> float:
    """Bits a byte that the end of a text costs it as it is, body and field together, frozen: what questions are routed by. Byte by
    byte, since where tokens end is a matter of each one's tokenizer. Safe beside a reply."""
    data = text.encode("utf-8", "replace")[-SURPRISE_BYTES:]
    return float(bits_of(ByteReader.of(life, ahead=data), data).mean()) if data else 0.0


class Reading(NamedTuple):
    """Of somebody who reads along; `at`: when they last asked."""

    reader: ByteReader
    at: float


class Member:
    """One organism in one mesh. `answers`: it may speak for others, because nobody else makes it speak; `exchange`: it
    gives others of what it learns, and lets its immunity judge what they give; `gammas`: also gammas; `supervised`: it lives
    in a colony; `say` tells a person what it does by itself."""

    def __init__(self, life: Organism, where: str, answers: bool = False, exchange: bool = False, supervised: bool = False,
                 gammas: bool = False, say: Callable[[str], None] = log.info):  # fmt: skip
        self.life, self.where, self.answers, self.exchange = life, where, answers, exchange
        self.supervised, self.gammas, self.say, self.hibernating = supervised, gammas, say, False
        self._napping = False  # whether it hibernates in its process
        self._offered = -1  # generation whose gamma was offered
        self.family = Family(life, where, say)
        self._asked: int | None = None  # the letter that asks the supervisor for a child's place
        self._given = life.memory.last_seq() if exchange else 0  # the last row that was looked at for a gift
        self.id = str(life.home.id)
        self._stop = threading.Event()
        self._mesh: Mesh | None = None
        self._trouble = ""
        self._told = self._summed = -1  # generations whose gamma and summary the mesh knows
        self._summed_at = -SUMMARY_SECONDS
        self._readings: dict[str, Reading] = {}  # by who reads along
        self._stirred = False  # whether letters or a summary may have left holes in the heap
        self._spoken = self._taught = 0  # answers and gifts since it woke

    def run(self) -> None:
        """Until `stop`, or a letter that says so. A mesh that cannot be used is reported once and tried again."""
        last, gave = -HEARTBEAT, time.monotonic()
        while not self._stop.is_set():
            try:
                mesh = self._joined()
                if time.monotonic() - last >= HEARTBEAT:
                    self._look_around(mesh)
                    mesh.heartbeat(self.id, self.facts(), self._news())
                    last = time.monotonic()
                    if self.supervised and self._stirred:
                        close_holes()
                        self._stirred = False
                if self.exchange and time.monotonic() - gave >= EXCHANGE / self.life.appetites.teach:
                    self.trade(mesh)
                    if self.gammas and not self.life.busy:
                        self.trade_gammas(mesh)
                    gave = time.monotonic()
                for letter in mesh.inbox(self.id):
                    self._open(mesh, letter)
                    self._stirred = True
                self._consider(mesh)
            except MeshError as error:
                self._complain(str(error))
                self._stop.wait(HEARTBEAT)
            self._stop.wait(self._tick())
        self.family.end()
        self._leave()

    def _tick(self) -> float:
        newest = max((reading.at for reading in self._readings.values()), default=0.0)
        return QUICK_TICK if self._readings and time.monotonic() - newest < QUICK_SECONDS else TICK

    def end(self) -> None:
        """Let `run` return soon; may be called by a signal."""
        self._stop.set()

    def _joined(self) -> Mesh:
        if self._mesh is None:
            self._mesh = open_mesh(self.where)
            self._mesh.register(
                self.id, str(self.life.home.path), self.facts(), self.life.home.birth_record.get("parent")
            )
        return self._mesh

    def _leave(self) -> None:
        if self._mesh is not None:
            try:
                self._mesh.leave(self.id)
                self._mesh.close()
            except MeshError as error:
                self._complain(str(error))
            self._mesh = None

    def _complain(self, text: str) -> None:
        if text != self._trouble:
            log.warning("%s", text)
        self._trouble = text

    def facts(self) -> dict[str, Any]:
        """What it tells of itself with a heartbeat; cheap, and nothing of what was said to it."""
        body, state, syntropy = self.life.published.body, self.life.state, self.life.syntropy
        return dict(stage=body.stage, n_params=body.n_params, loss=state.get("loss"), generation=self.life.published.number,
                    syntropy=syntropy.trend.mean, entropy=syntropy.entropy,
                    lived_bytes=state.get("lived_bytes"), training_tokens=state.get("training_tokens"), answers=self.answers,
                    hibernating=self.hibernating, peers=self.life.peers, keen=self.life.appetites.answer,
                    spent=time.process_time(), steps=body.steps, slope=self.life.slope, waiting=self.life.buffer.bytes,
                    answered=self._spoken, taught=self._taught)  # fmt: skip

    def _look_around(self, mesh: Mesh) -> None:
        """Who else lives, and how well they do; children that have ended are reaped."""
        others = [peer for peer in mesh.peers(living=True) if peer.id != self.id]
        self.life.peers = len(others)
        self.life.peer_syntropies = [
            peer.facts["syntropy"] for peer in others if _is_number(peer.facts.get("syntropy"))
        ]
        self.family.reap()

    # What syntropy proposes.

    def _consider(self, mesh: Mesh) -> None:
        """Divide or hibernate, once the burst after which that was proposed is over."""
        if self.life.proposal is None or self.life.busy:
            return
        proposal, self.life.proposal = self.life.proposal, None
        if proposal == "hibernate":
            self._hibernate(mesh)
        elif self.supervised:
            self._asked = mesh.post(self.id, SUPERVISOR, "divide", dict(home=str(self.life.home.path)))
        else:
            self.family.divide()

    def _hibernate(self, mesh: Mesh) -> None:
        if not self.supervised:
            self.life.hibernate()
            self._napping = True
            self.say("It sleeps: it learns nothing new, and others do. It goes on when it is told something.")
            return
        self.hibernating = True
        mesh.heartbeat(self.id, self.facts())
        self.life.hibernate()
        self.end()

    def _answered(self, letter: Letter) -> None:
        """The supervisor says where the child may live, or why it may not be born."""
        if letter.sender != SUPERVISOR or letter.payload.get("to") != self._asked:
            return
        self._asked = None
        if home := letter.payload.get("home"):
            self.family.bear(home)
        else:
            self.life.memory.event("undivided", dict(reason=letter.payload.get("error")))

    def _news(self) -> dict[str, bytes]:
        """Its gamma, where that is another than the mesh knows; of who answers for others, now and then a summary."""
        number, news = self.life.published.number, {}
        if number != self._told:
            self._told, news["gamma"] = number, gamma_blob(self.life)
        if self.answers and number != self._summed and time.monotonic() - self._summed_at >= SUMMARY_SECONDS:
            self._summed, self._summed_at = number, time.monotonic()
            news["summary"] = self.summary().blob()
            self._stirred = True
        return news

    def summary(self) -> Summary:
        """Of the newest that it lived, by which the colony routes without asking."""
        return Summary.of(row.text for row in reversed(self.life.memory.newest_lived(NEWEST)))

    def trade(self, mesh: Mesh) -> tuple[int, int]:
        """Offer the newest text that it has learned since the last time, and queue what others offer; (given, taken).

        What comes from others, or from a conversation, is not given on. What is taken waits under the source "mesh:ID", to be
        judged like all that waits; what is refused lies in the quarantine under that name.
        """
        rows = list(self.life.memory.lived(after_seq=self._given))
        self._given = rows[-1].seq if rows else self._given
        own = worth_giving(rows)
        for row in own:
            mesh.offer(self.id, "text", _whole_lines(row.text))
            self._taught += 1
        gifts = mesh.claim(self.id, "text")
        for gift in gifts:
            self.life.learn(gift.payload[:GIFT_BYTES], source=f"mesh:{gift.sender}")
        return len(own), len(gifts)

    def trade_gammas(self, mesh: Mesh) -> tuple[int, int]:
        """Offer its gamma, where that is new and fits into an offer, and try the newest of each of the others; (given, taken
        in)."""
        given, taken, snap = 0, 0, self.life.published
        with tempfile.TemporaryDirectory(prefix="organism-gamma-") as folder:
            path = Path(folder) / "gamma"
            if snap.number != self._offered and snap.body.steps:
                self._offered = snap.number
                export_gamma(snap.body, snap.tokenizer, path, self.id)
                if path.stat().st_size <= OFFER_BYTES:
                    mesh.offer(self.id, "gamma", path.read_bytes())
                    given = 1
            for gift in {gift.sender: gift for gift in mesh.claim(self.id, "gamma", 64)}.values():
                path.write_bytes(gift.payload)
                try:
                    taken += self.life.try_gamma(path, GAMMA_STRENGTH, f"mesh:{gift.sender}").accepted
                except OrganismError as error:  # it comes from others
                    self.life.memory.event(
                        "gamma", dict(decision="refuse", source=f"mesh:{gift.sender}", reason=str(error))
                    )
        return given, taken

    # Letters.

    def _open(self, mesh: Mesh, letter: Letter) -> None:
        """Do what a letter asks; whatever it is, its writer hears of it, and the next letter is opened."""
        kinds: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {"surprise": self._surprise}
        if self.answers:
            kinds |= {"topology": self._placed, "ask": self._ask, "learn": self._learn, "stop": self._end,
                      "metabolism": lambda payload: self._fed(letter.sender, payload),
                      "read": lambda payload: self._read(letter.sender, payload["text"]),
                      "next": lambda payload: self._read_on(letter.sender, payload["byte"])}  # fmt: skip
        if letter.kind in ANSWERS:
            self._answered(letter)
            mesh.settle([letter.id])
            return
        if self._napping:  # but who was put to sleep by hand goes on sleeping
            self._napping = False
            self.life.start()
        try:
            if letter.kind not in kinds:
                raise OrganismError(f"{self.id} does not take letters of kind {letter.kind!r}.")
            answer = kinds[letter.kind](letter.payload)
        except (OrganismError, KeyError, TypeError, ValueError, AttributeError) as error:  # letters come from others
            answer = dict(
                error=str(error)
                if isinstance(error, OrganismError)
                else f"The letter is not as it should be: {error!r}."
            )
        mesh.post(self.id, letter.sender, "answer", dict(answer, to=letter.id))
        mesh.settle([letter.id])

    def _surprise(self, payload: dict[str, Any]) -> dict[str, Any]:
        return dict(bits_per_byte=surprise_per_byte(self.life, payload["text"]))

    def _placed(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Where it stands among the others, as the supervisor's monitor sees it: an event of its life."""
        self.life.memory.event("topology", payload)
        return {}

    def _fed(self, sender: str, payload: dict[str, Any]) -> dict[str, Any]:
        """What the colony's metabolism would have it do more of."""
        if sender != SUPERVISOR:
            raise OrganismError("Only the supervisor of a colony says what to do more of.")
        given = [payload[name] for name in Appetites._fields]
        if not all(_is_number(factor) for factor in given):
            raise OrganismError(f"Appetites are numbers, not {given}.")
        self.life.appetites = Appetites(*(min(MOST, max(LEAST, factor)) for factor in given))
        return {}

    def _ask(self, payload: dict[str, Any]) -> dict[str, Any]:
        reply = self.life.say(payload["text"])
        text = reply.text  # the reply is made here
        self._spoken += 1
        return dict(reply.as_dict(), text=text)

    def _read(self, who: str, text: str) -> dict[str, Any]:
        """Somebody reads along from here: the distributions of each byte of a text, and of the one after it."""
        if len(self._readings) >= READERS:
            del self._readings[min(self._readings, key=lambda one: self._readings[one].at)]
        data = text.encode("utf-8", "replace")
        reader, rows = ByteReader.of(self.life, ahead=data), []
        for byte in data:
            rows.append(reader.next())
            reader.advance(bytes([byte]))
        self._readings[who] = Reading(reader, time.monotonic())
        return dict(p=packed([*rows, reader.next()]))

    def _read_on(self, who: str, byte: int) -> dict[str, Any]:
        """The distribution after one more byte."""
        if who not in self._readings:
            raise OrganismError(f"{who} does not read along here, or not any more.")
        reader = self._readings[who].reader
        reader.advance(bytes([byte]))
        self._readings[who] = Reading(reader, time.monotonic())
        return dict(p=packed([reader.next()]))

    def _learn(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Text from somebody else waits for this one's own immunity, as any text does."""
        return dict(queued=self.life.learn(payload["text"], source=str(payload.get("source", "mesh"))))

    def _end(self, payload: dict[str, Any]) -> dict[str, Any]:
        self.end()
        return dict(asleep=True)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _whole_lines(text: bytes) -> bytes:
    """The beginning of a text, at most GIFT_BYTES, up to the end of a line where there is one."""
    head = text[:GIFT_BYTES]
    return head if len(text) <= GIFT_BYTES else head[: head.rfind(b"\n") + 1] or head
