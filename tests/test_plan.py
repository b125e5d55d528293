"""train.py --plan: what is read from compiled programs, and what is said of a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kernels.ahead_of_time import tpu_chips
from linvideo_jax.plan import chips, collectives, hlo
from linvideo_jax.plan.collectives import Collective

PROGRAM = """HloModule jit_f, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%start (p: bf16[1,64]) -> (bf16[1,64], bf16[1,256]) {
  %p = bf16[1,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[1,256]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={1}
  ROOT %pair = (bf16[1,64]{1,0}, bf16[1,256]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (q: bf16[1,64]) -> bf16[1,256] {
  %q = bf16[1,64]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[1,256]{1,0} all-gather(%q), channel_id=7, replica_groups=[2,4]<=[8], dimensions={1}
}

%softmax (a: f32[128]) -> f32[128] {
  %a = f32[128]{0} parameter(0)
  ROOT %ring = f32[128]{0} collective-permute(%a), channel_id=8, source_target_pairs={{0,1},{1,0}}
}

%linear (b: f32[128]) -> f32[128] {
  %b = f32[128]{0} parameter(0)
  ROOT %state = f32[128]{0} all-reduce(%b), channel_id=9, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

%mix (c: f32[128]) -> f32[128] {
  %c = f32[128]{0} parameter(0)
  %one = f32[128]{0} collective-permute(%c), channel_id=10, source_target_pairs={{0,1},{1,0}}
  ROOT %two = f32[128]{0} all-reduce(%one), channel_id=11, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

%body (arg: (s32[], f32[128])) -> (s32[], f32[128]) {
  %arg = (s32[]{:T(128)}, f32[128]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %v = f32[128]{0} get-tuple-element(%arg), index=1
  %w = bf16[1,64]{1,0} constant({...})
  %begun = (bf16[1,64]{1,0}, bf16[1,256]{1,0}) fusion(%w), kind=kCustom, calls=%start
  %ended = bf16[1,256]{1,0} fusion(%w), kind=kCustom, calls=%done
  %r = f32[128]{0} conditional(%i, %v, %v, /*index=3*/%v), branch_computations={%softmax, %linear, %mix}
  ROOT %next = (s32[]{:T(128)}, f32[128]{0}) tuple(%i, %r)
}

%condition (arg.1: (s32[], f32[128])) -> pred[] {
  %arg.1 = (s32[]{:T(128)}, f32[128]{0}) parameter(0)
  %limit = s32[]{:T(128)} constant(6)
  %j = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %limit), direction=LT
}

ENTRY %main (x.1: f32[128]) -> f32[128] {
  %x.1 = f32[128]{0} parameter(0)
  %zero = s32[]{:T(128)} constant(LOWEST)
  %copied = s32[]{:T(128)} copy(%zero)
  %tuple = (s32[]{:T(128)}, f32[128]{0}) tuple(%copied, %x.1)
  %while = (s32[]{:T(128)}, f32[128]{0}) while(%tuple), condition=%condition, body=%bodyTRIPS
  %out = f32[128]{0} get-tuple-element(%while), index=1
  %s = f32[16]{0} reduce-scatter(%out), channel_id=1, replica_groups=mesh['a'=2,'b'=4] {'a','b'}, to_apply=%add
  %t-start = (f32[16]{0}, f32[64]{0}) all-gather-start(%s), channel_id=2, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  %t = f32[64]{0} all-gather-done(%t-start)
  %nothing = f32[64]{0} all-reduce(%t), channel_id=3, replica_groups=[8,1]<=[8], to_apply=%add
  ROOT %u = f32[128]{0} all-to-all(%out), channel_id=4, replica_groups=[1,8]<=[8], dimensions={0}
}
"""  # noqa: E501


def program(lowest="0", trips=""):
    return PROGRAM.replace("LOWEST", lowest).replace("TRIPS", trips)


def test_collectives_of_a_program_text():
    found = collectives.count(program(), 8)
    assert found.unknown_loops == 0
    assert sorted(found.collectives, key=lambda one: (one.kind, one.times)) == [
        Collective("all-gather", 64, 256, 4, 1),
        Collective("all-gather", 128, 512, 4, 6),  # once, though its start and its end name it
        Collective("all-reduce", 512, 512, 2, 6),  # of the branch that sends most, mix
        Collective("all-to-all", 512, 512, 8, 1),
        Collective("collective-permute", 512, 512, 8, 6),
        Collective("reduce-scatter", 512, 64, 8, 1),
    ]
    sent = {kind: bytes_sent for kind, (_, bytes_sent) in found.by_kind().items()}
    assert sent == {
        "all-gather": 0.75 * 256 + 6 * 0.75 * 512,
        "all-reduce": 6 * 2 * 0.5 * 512,
        "all-to-all": 7 / 8 * 512,
        "collective-permute": 6 * 512,
        "reduce-scatter": 7 / 8 * 512,
    }
    assert found.sent == sum(sent.values())


def test_branches_by_how_often_they_are_taken():
    calls = collectives.count(program(), 8, (1 / 3, 2 / 3, 0)).by_kind()
    assert calls["collective-permute"] == (2, 2 * 512)
    assert calls["all-reduce"] == (4, 4 * 512)


def test_trip_counts():
    def trips(**changes):
        text = hlo.parse(program(**changes))
        main = text.computations[text.entry]
        return hlo.trip_count(text, main, main["while"])

    assert trips() == 6 and trips(lowest="2") == 4
    noted = ', backend_config={"known_trip_count":{"n":"11"}}'
    assert trips(trips=noted) == 11
    unknown = program().replace("direction=LT", "direction=NE")
    assert collectives.count(unknown, 8).unknown_loops == 1


def test_shapes():
    shape = "(bf16[2,3]{1,0:T(8,128)(2,1)}, pred[5], f32[], /*index=3*/s8[7]{0}, f8e4m3fn[4])"
    assert hlo.shape_bytes(shape) == 12 + 5 + 4 + 7 + 4


def test_a_compiled_scan_gathers_each_layer_once_a_direction():
    """FSDP over a scan of five layers, compiled for four TPU chips that are not here."""
    devices = tpu_chips("v5e:2x2")
    mesh = Mesh(np.array(devices), ("fsdp",))

    def loss(weights, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0].sum()

    def shape(*sides, spec):
        sharding = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct(sides, jnp.bfloat16, sharding=sharding)

    weights = shape(5, 1024, 1024, spec=(None, "fsdp"))
    inputs = weights, shape(64, 1024, spec=("fsdp",))
    text = (
        jax.jit(jax.grad(loss), out_shardings=weights.sharding).lower(*inputs).compile().as_text()
    )
    found = collectives.count(text, 4)
    layer = 2 * 1024 * 1024
    calls, sent = found.by_kind()["all-gather"]
    assert found.unknown_loops == 0 and calls == 10 and sent == 10 * 0.75 * layer
    # A gradient is summed into shards: by a reduce-scatter, or by an all-reduce and a slice.
    assert 5 * 0.75 * layer <= found.sent - sent <= 2 * 5 * 0.75 * layer


@pytest.mark.parametrize(
    ("text", "num_chips", "is_tpu", "one_way"),
    [
        ("v5p:4x4x4", 64, True, (200e9, 600e9)),
        ("v5e:8x8", 64, True, (100e9, 200e9)),
        ("v6e:16x16", 256, True, (200e9, 400e9)),
        ("h100:8", 8, False, (450e9, 450e9)),
        ("h100:32", 32, False, (50e9, 450e9)),
    ],
)
def test_machines(text, num_chips, is_tpu, one_way):
    machine = chips.machine(text)
    assert (machine.num_chips, machine.is_tpu, machine.one_way) == (num_chips, is_tpu, one_way)
