# SPDX-License-Identifier: Apache-2.0
"""Workers that measure with a checkpoint: one in this process, or several Ray actors, with the same results."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from avar_verl.data.rows import Row, naming
from avar_verl.model.checkpoint import Checkpoint
from avar_verl.plugin.datasets.images import patch_size_of
from avar_verl.tools.rows import Conversation, conversation
from avar_verl.tools.vas.command import Vas
from avar_verl.tools.vas.partners import Job
from avar_verl.tools.vas.score import DEPENDENCY, Scorer, image_features
from avar_verl.tools.vas.words import where_words_look

# Batches queued per actor: one is measured while the next one is sent.
BATCHES_PER_ACTOR = 2


class Worker:
    """Turns rows into records. The constructor loads the checkpoint."""

    def __init__(self, settings: Vas):
        self.settings = settings
        self.checkpoint = Checkpoint.load(settings.model, settings.device, getattr(torch, settings.dtype))
        self.scorer = Scorer(
            self.checkpoint,
            settings.queries,
            settings.layers,
            settings.response_tokens,
            corruption=settings.dependency,
        )
        self.patch_size = patch_size_of(self.checkpoint.processor)

    @property
    def layers(self) -> tuple[int, ...]:
        return self.scorer.layers

    def conversation(self, row: Row) -> Conversation:
        """The conversation of a row.

        Raises:
            ValueError: names the row; anything that `conversation` refuses, or a row without the response to measure.
        """
        with naming(row.where):
            out = conversation(row.values, self.patch_size, self.settings.system)
            answered = out.response is not None or out.response_ids is not None
            if self.settings.needs_response and self.settings.response_tokens is None and not answered:
                what = "response queries need" if "response" in self.settings.queries else "dependency needs"
                raise ValueError(
                    f"{what} a response; got a row without one. Pass --generate to have the model answer, or only "
                    "--query user."
                )
        return out

    def _swapped(self, partner: Row | None) -> dict[str, torch.Tensor] | None:
        """Features of the images of a partner."""
        if partner is None:
            return None
        images = conversation(partner.values, self.patch_size).images
        return image_features(self.checkpoint.processor, images)

    def measure(self, batch: Sequence[Job]) -> list[dict[str, Any]]:
        """Records of rows, in their order."""
        rows = [job.row for job in batch]
        conversations = [self.conversation(row) for row in rows]
        partners = [self._swapped(job.partner) for job in batch]
        with naming(f"among {rows[0].where} to {rows[-1].where}"):
            samples = self.scorer.prepare(conversations)
            scored = self.scorer.score(samples, partners)
        records = []
        for job, one, sample, parts in zip(batch, conversations, samples, scored, strict=True):
            record = {"row": job.row.index, "sample": one.digest, **parts}
            if job.partner is not None and DEPENDENCY in parts:
                record["partner"] = job.partner.index
            if self.settings.response_tokens is not None:
                tokenizer = self.checkpoint.processor.tokenizer
                record["generated"] = tokenizer.decode(sample.response_ids, skip_special_tokens=True)
                record["generated_ids"] = sample.response_ids
            records.append(record)
        return records

    def look(
        self, row: Row, response_ids: list[int] | None, words: Sequence[str] | None, dependency: list[float] | None
    ) -> dict[str, Any]:
        """Where words of a row's response look in its images (`where_words_look`); `response_ids` if generated."""
        one = self.conversation(row)
        scorer = self.scorer if response_ids is None else self._rescorer()
        if response_ids is not None:
            one = Conversation(one.prompt, None, response_ids, one.turns, one.template_kwargs)
        return {
            "row": row.index,
            **where_words_look(self.checkpoint, one, scorer.prepare([one])[0], self.layers, words, dependency),
        }

    def _rescorer(self) -> Scorer:
        return Scorer(self.checkpoint, self.settings.queries, self.settings.layers)


class LocalWorkers:
    """One worker in this process, created on first use: a finished measurement loads no model."""

    def __init__(self, settings: Vas):
        self._settings = settings
        self._worker: Worker | None = None

    def __enter__(self) -> "LocalWorkers":
        return self

    def __exit__(self, *_exception) -> None:
        self._worker = None

    @property
    def worker(self) -> Worker:
        if self._worker is None:
            self._worker = Worker(self._settings)
        return self._worker

    def measure(self, batches: Iterable[list[Job]]) -> Iterator[list[dict[str, Any]]]:
        return (self.worker.measure(batch) for batch in batches)

    def look(self, jobs: Sequence[tuple]) -> list[dict[str, Any]]:
        return [self.worker.look(*job) for job in jobs]


class RayWorkers:
    """`ray` Ray actors, each with the checkpoint on its own GPU or core.

    Rows are sent as stored, and the actors open the images. Batches are the same as in one process, so records are too;
    they arrive in order of completion. Joins the cluster at RAY_ADDRESS or one running on this machine, or else starts
    Ray here.

    Raises:
        ValueError: with the first batch, more actors than the cluster has places for: it would wait forever.
    """

    def __init__(self, settings: Vas):
        self._settings = settings
        self._actors: list = []

    def __enter__(self) -> "RayWorkers":
        import ray

        self._started = not ray.is_initialized()
        if self._started:
            ray.init(include_dashboard=False, log_to_driver=False)
        return self

    def __exit__(self, *_exception) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)
        self._actors = []
        if self._started:
            ray.shutdown()

    @property
    def actors(self) -> list:
        """Create the actors on first use."""
        import ray

        if not self._actors:
            kind = "GPU" if self._settings.device.startswith("cuda") else "CPU"
            places = int(ray.cluster_resources().get(kind, 0))
            if places < self._settings.ray:
                raise ValueError(
                    f"every worker takes one {kind} of the Ray cluster; got --ray {self._settings.ray} for {places}. "
                    "Use fewer, or start more nodes."
                )
            remote = ray.remote(**{f"num_{kind.lower()}s": 1})(Worker)
            self._actors = [remote.remote(self._settings) for _ in range(self._settings.ray)]
        return self._actors

    def measure(self, batches: Iterable[list[Job]]) -> Iterator[list[dict[str, Any]]]:
        import ray

        batches, running = iter(batches), {}

        def feed(actor) -> None:
            batch = next(batches, None)
            if batch is not None:
                running[actor.measure.remote(batch)] = actor

        first = next(batches, None)  # Without a batch, no actor is created.
        if first is None:
            return
        batches = itertools.chain([first], batches)
        for actor in self.actors * BATCHES_PER_ACTOR:
            feed(actor)
        while running:
            done, _ = ray.wait(list(running), num_returns=1)
            feed(running.pop(done[0]))
            yield self._get(done[0])

    def look(self, jobs: Sequence[tuple]) -> list[dict[str, Any]]:
        return [self._get(self.actors[0].look.remote(*job)) for job in jobs]

    @staticmethod
    def _get(reference) -> Any:
        """The result of an actor; its ValueError is raised here."""
        import ray

        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, ValueError):
                raise error.cause from error
            raise
