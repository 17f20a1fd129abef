"""Settings of compressors that are refused or warned of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from hvd_ecsgd import Compression, CompressionError
from hvd_ecsgd.compressors import (
    QSGD,
    BlockTopK,
    Cast,
    GlobalRandomBlock,
    Identity,
    Natural,
    RandomBlock,
    RandomK,
    Sign,
    Ternary,
    Threshold,
    TopK,
    base,
)
from hvd_ecsgd.exchange import TwoPass
from hvd_ecsgd.feedback import ErrorFeedback, LocalMomentum, NoFeedback
from hvd_ecsgd.protocols import Compressor, UnbiasedCompressor


@pytest.fixture(autouse=True)
def _forget_warnings() -> Iterator[None]:
    base._warned.clear()
    yield
    base._warned.clear()


# -- settings --------------------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "cast to float32": (lambda: Cast(torch.float32), "float16 or torch.bfloat16"),
    "global ratio": (lambda: Compression.global_random_block(0.5), "ratio"),
    "fewer blocks than the ratio": (lambda: Compression.global_random_block(64, 10), "blocks ≥ ratio"),
    "no blocks": (lambda: Compression.global_random_block(4, 0), "blocks"),
    "blocks a fraction": (lambda: GlobalRandomBlock(4, 2.5), "blocks"),  # type: ignore[arg-type]
    "random_k ratio": (lambda: Compression.random_k(0.1), "ratio"),
    "random_k unbiased": (lambda: RandomK(4, 1), "unbiased"),  # type: ignore[arg-type]
    "threshold ratio": (lambda: Compression.threshold(float("nan")), "ratio"),
    "sample 0": (lambda: Compression.threshold(sample=0), "sample"),
    "sample above 1": (lambda: Compression.threshold(sample=1.5), "sample"),
    "two bits": (lambda: Compression.threshold(two_bits=2), "two_bits"),
    "sample true": (lambda: Threshold(4, True), "sample"),
    "k and block": (lambda: Compression.top_k(k=3, block=512), "not both"),
    "block 0": (lambda: Compression.top_k(block=0), "block"),
    "block beyond int16": (lambda: BlockTopK(4, 2**15 + 1), "block"),
    "sign block": (lambda: Compression.one_bit(block=-1), "block"),
    "ternary scale": (lambda: Compression.ternary("max"), "scale"),  # type: ignore[arg-type]
    "levels 0": (lambda: Compression.qsgd(0), "levels"),
    "levels above 127": (lambda: Compression.qsgd(128), "levels"),
    "bucket": (lambda: Compression.qsgd(bucket=True), "bucket"),
    "norm": (lambda: Compression.qsgd(norm="l1"), "norm"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_settings(what: str) -> None:
    make, message = WRONG[what]
    with pytest.raises(CompressionError, match=message):
        make()


def test_compressors_are_what_the_protocols_say() -> None:
    every = [Cast(), GlobalRandomBlock(), RandomK(), Threshold(), BlockTopK(), Sign(), Ternary(), QSGD(), Natural(), Identity(), TopK()]
    assert all(isinstance(c, Compressor) for c in every)
    assert [c for c in every if c.unbiased] == [QSGD(), Natural(), Identity()]
    assert all(isinstance(c, UnbiasedCompressor) for c in every if c.unbiased)
    assert isinstance(RandomK(unbiased=True), UnbiasedCompressor)
    assert not isinstance(TopK(), UnbiasedCompressor)


# -- feedback and δ --------------------------------------------------------------------------------------------------------------

REFUSED: dict[str, Callable[[], Any]] = {
    "error feedback": lambda: Compression(RandomK(4, True)),
    "by the preset": lambda: Compression.random_k(4, unbiased=True, error_feedback=True),
    "local momentum": lambda: Compression(RandomK(4, True), LocalMomentum(0.3)),
    "on the worker of two": lambda: Compression.double_squeeze(RandomK(4, True), Identity()),
    "on the server": lambda: Compression(TopK(), ErrorFeedback(), TwoPass(RandomK(4, True))),
    "on the server, by default": lambda: Compression(RandomK(4, True), NoFeedback(), TwoPass()),
    "on a server that skips": lambda: Compression.comp_skip(None, None, TopK(), RandomK(4, True)),
    "in a reset": lambda: Compression.cser(TopK(), RandomK(4, True)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_unbiased_scaling_with_feedback_is_refused(what: str) -> None:
    with pytest.raises(CompressionError, match=r"2 − d/k.*unbiased=False"):
        REFUSED[what]()


def test_unbiased_scaling_without_feedback_is_allowed() -> None:
    """Control."""
    assert Compression.random_k(4, unbiased=True).method.feedback == NoFeedback()
    Compression(RandomK(4, True), NoFeedback(), TwoPass(server_feedback=False))
    Compression(RandomK(4, True), NoFeedback(), TwoPass(TopK()))
    assert Compression.random_k(4).method.feedback == ErrorFeedback()


BIASED = [Sign(), Ternary(), TopK(), BlockTopK(), Threshold(), RandomK(4), RandomBlock(), GlobalRandomBlock(), Cast(), "qsgd"]


@pytest.mark.parametrize("compressor", BIASED, ids=repr)
def test_methods_for_unbiased_compressors_refuse_others(compressor: Any) -> None:
    with pytest.raises(CompressionError, match=r"unbiased: expected an unbiased compressor.*error feedback"):
        Compression.unbiased(compressor)


def test_methods_for_unbiased_compressors_take_them() -> None:
    """Control."""
    for compressor in (QSGD(), Natural(), RandomK(4, unbiased=True), Identity()):
        assert Compression.unbiased(compressor).method.feedback == NoFeedback()
    assert Compression.unbiased(RandomK(4, unbiased=True)).method == Compression.random_k(4, unbiased=True).method


WARNED: dict[str, tuple[Callable[[], Any], str]] = {
    "sign": (lambda: Compression.one_bit("l2"), "2‖v‖₁/"),
    "ternary": (lambda: Compression.ternary("l2"), "√nnz"),
    "both sides": (lambda: Compression.double_squeeze(Ternary()), "√nnz"),
    "server only": (lambda: Compression(TopK(), NoFeedback(), TwoPass(Sign("l2"))), "2‖v‖₁/"),
    "qsgd": (lambda: Compression.qsgd(7, error_feedback=True), "ω = 3.23"),
    "momentum": (lambda: Compression(Sign("l2"), LocalMomentum(0.0)), "2‖v‖₁/"),
}


@pytest.mark.parametrize("what", WARNED)
def test_no_contraction_in_general_warns_once(what: str) -> None:
    make, message = WARNED[what]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            make()
    (warning,) = caught
    assert warning.category is UserWarning
    assert warning.filename == __file__, "it points at the line that chose the method"
    assert message in str(warning.message)
    assert "contraction" in str(warning.message)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Compression.one_bit("l2", error_feedback=False),
        lambda: Compression.one_bit(),
        lambda: Compression.one_bit(block=64),
        lambda: Compression.ternary(),
        lambda: Compression.ternary("l2", error_feedback=False),
        lambda: Compression(Ternary(), NoFeedback(), TwoPass(server_feedback=False)),
        lambda: Compression.qsgd(7),
        lambda: Compression.qsgd(error_feedback=True),
        lambda: Compression.natural(error_feedback=True),
        lambda: Compression.double_squeeze(),
        lambda: Compression.threshold(),
        lambda: Compression.global_random_block(),
    ],
)
def test_contractions_and_methods_without_feedback_do_not_warn(make: Callable[[], Any]) -> None:
    """Control."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make()
