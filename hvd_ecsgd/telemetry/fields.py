"""What the numbers of a record mean: the one source of the table in docs/telemetry.md, which `python docs/telemetry.py` writes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FIELDS", "Field"]


@dataclass(frozen=True)
class Field:
    """One number of a record. `where`: "step" (the whole record), "group" (each entry of `groups`), or "both"."""

    name: str
    where: str
    meaning: str


FIELDS = (
    Field("step", "step", "number of the (last) step, counted from 0"),
    Field("steps", "step", "steps that the record covers: `every=`, or fewer at the end"),
    Field("outcome", "step", "`stands`; `silent` (nothing came back, x stays); `local` (nothing is sent); `undone` (an inf or NaN); `discarded`"),
    Field("undone_steps", "step", "undone and discarded steps so far"),
    Field(
        "staleness_updates",
        "step",
        "updates that x took while this worker computed, on the server with the most of them; asynchronous training alone",
    ),
    Field("unix_seconds", "step", "when the record was made"),
    Field("step_seconds", "step", "since the record before; absent in the first one"),
    Field("wire_seconds", "step", "in which some collective of ours was under way, until this rank took its result"),
    Field("wait_seconds", "step", "in which the exchange had nothing to do but to wait; absent where Horovod itself waits"),
    Field("telemetry_seconds", "step", "that measuring, and writing the record before, have taken"),
    Field("group", "group", "index of the optimizer's param group"),
    Field("payload_bytes", "both", "that this worker contributes, as worker and as server"),
    Field("sent_bytes", "both", "that leave this worker, where collectives are bandwidth-optimal"),
    Field("received_bytes", "both", "that come to it, likewise"),
    Field("dense_bytes", "both", "that a ring all-reduce without compression would send"),
    Field("skipped_bytes", "both", "of payloads that were not sent as worker or server stayed silent"),
    Field("ratio", "both", "`dense_bytes` ÷ `sent_bytes`; absent where either is nothing"),
    Field("kernel_seconds", "both", "in accumulating, compressing, decoding; on GPUs until they are launched"),
    Field("relative_error", "both", "‖u − C(u)‖ ÷ ‖u‖, u being what the worker compresses; 1 − its square is δ"),
    Field("gradient_norm", "both", "‖g‖ of this worker's gradient, unscaled and clipped"),
    Field("residual_norm", "both", "‖e‖, what this worker holds back, in the method's unit"),
    Field(
        "residual_to_gradient",
        "both",
        "‖e‖ ÷ ‖g‖ (in update units ‖e‖ ÷ ‖ηg‖) of the compressed parameters: about how many steps' gradients wait",
    ),
    Field("server_residual_norm", "both", "‖E‖, what this rank holds back as a server"),
    Field(
        "staleness_steps",
        "group",
        "steps in a row, this one included, in which this worker sent nothing of some parameter; from its first silent step on",
    ),
    Field("skips", "group", "steps so far in which it sent nothing of all compressed parameters of the group; likewise"),
)
