"""train.py --plan: what is read from compiled programs, and what is said of a run."""

import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import train
from benchmarks import plans
from kernels.ahead_of_time import tpu_chips
from linvideo_jax import config_files, rehearsal
from linvideo_jax.models import registry
from linvideo_jax.models.remat import rematerialised
from linvideo_jax.models.wan_config import WanConfig
from linvideo_jax.parallel import mesh as meshes
from linvideo_jax.parallel.layout import gather
from linvideo_jax.plan import chips, collectives, compiled, hlo, planned, simulated
from linvideo_jax.plan.collectives import Collective
from linvideo_jax.plan.compiled import Compiled, compile_updates, refused
from linvideo_jax.plan.stage import Program

PROGRAM = r"""HloModule jit_f, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%start (p: bf16[1,64]) -> (bf16[1,64], bf16[1,256]) {
  %p = bf16[1,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[1,256]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={1}, backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %pair = (bf16[1,64]{1,0}, bf16[1,256]{1,0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%done (q: bf16[1,64]) -> bf16[1,256] {
  %q = bf16[1,64]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[1,256]{1,0} all-gather(%q), channel_id=7, replica_groups=[2,4]<=[8], dimensions={1}, backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"15"}}
}

%all-reduce-scatter.3 (d: f32[128]) -> f32[32] {
  %d = f32[128]{0} parameter(0)
  %whole = f32[128]{0} all-reduce(%d), channel_id=1, replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([4,2]T(1,0)) {'b'}, to_apply=%add
  ROOT %part = f32[32]{0} dynamic-slice(%whole), dynamic_slice_sizes={32}
}

%softmax (a: f32[128]) -> f32[128] {
  %a = f32[128]{0} parameter(0)
  ROOT %ring = f32[128]{0} collective-permute(%a), channel_id=1, source_target_pairs={{0,1},{1,0}}
}

%linear (b: f32[128]) -> f32[128] {
  %b = f32[128]{0} parameter(0)
  ROOT %state = f32[128]{0} all-reduce(%b), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

%mix (c: f32[128]) -> f32[128] {
  %c = f32[128]{0} parameter(0)
  %one = f32[128]{0} collective-permute(%c), channel_id=1, source_target_pairs={{0,1},{1,0}}
  ROOT %two = f32[128]{0} all-reduce(%one), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
}

%body (arg: (s32[], f32[128])) -> (s32[], f32[128]) {
  %arg = (s32[]{:T(128)}, f32[128]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %v = f32[128]{0} get-tuple-element(%arg), index=1
  %w = bf16[1,64]{1,0} constant({...})
  %kernel = (f32[8]{0}, f32[128]{0}) custom-call(%v), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{\"block_q\": 512}"
}}, metadata={op_name="attention"}
  %begun = (bf16[1,64]{1,0}, bf16[1,256]{1,0}) fusion(%w), kind=kCustom, calls=%start
  %ended = bf16[1,256]{1,0} fusion(%w), kind=kCustom, calls=%done
  %r = f32[128]{0} conditional(%i, %v, %v, /*index=3*/%v), branch_computations={%softmax, %linear, %mix}
  %one.1 = s32[]{:T(128)} constant(1)
  %i.1 = s32[]{:T(128)} add(%i, %one.1)
  %rise = s32[]{:T(128)} constant(RISE)
  %i.2 = s32[]{:T(128)} add(%i.1, %rise)
  ROOT %next = (s32[]{:T(128)}, f32[128]{0}) tuple(%i.2, %r)
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
  %v = f32[32]{0} fusion(%out), kind=kCustom, calls=%all-reduce-scatter.3
  %nothing = f32[64]{0} all-reduce(%t), channel_id=3, replica_groups=[8,1]<=[8], to_apply=%add
  ROOT %u = f32[128]{0} all-to-all(%out), channel_id=4, replica_groups=[1,8]<=[8], dimensions={0}
}
"""  # noqa: E501


def program(lowest="0", trips="", rise="0"):
    return PROGRAM.replace("LOWEST", lowest).replace("TRIPS", trips).replace("RISE", rise)


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
        Collective("reduce-scatter", 512, 512, 4, 1),  # an all-reduce and a slice, by name
    ]
    sent = {kind: bytes_sent for kind, (_, bytes_sent) in found.by_kind().items()}
    assert sent == {
        "all-gather": 0.75 * 256 + 6 * 0.75 * 512,
        "all-reduce": 6 * 2 * 0.5 * 512,
        "all-to-all": 7 / 8 * 512,
        "collective-permute": 6 * 512,
        "reduce-scatter": 7 / 8 * 512 + 3 / 4 * 512,
    }
    assert found.sent == sum(sent.values())


def test_a_gpu_gathers_several_arrays_at_once():
    text = """
ENTRY %main (a: bf16[8,4], b: f32[2]) -> bf16[16,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %b = f32[2]{0} parameter(1)
  %start = ((bf16[8,4]{1,0}, f32[2]{0}), (bf16[16,4]{1,0}, f32[4]{0})) all-gather-start(%a, %b), channel_id=1, replica_groups=mesh['context'=2] {'context'}, dimensions={0}
  %done = (bf16[16,4]{1,0}, f32[4]{0}) all-gather-done(%start)
  ROOT %out = bf16[16,4]{1,0} get-tuple-element(%done), index=0
}
"""  # noqa: E501
    (one,) = collectives.count(text, 2).collectives
    assert one == Collective("all-gather", 64 + 8, 128 + 16, 2, 1)


def test_a_sum_of_which_a_part_is_kept_is_one_into_shards():
    """In the partitioner's text alone: a compiler that has ended says itself what it does."""
    text = """HloModule jit_f, num_partitions=4

ENTRY %main (x: bf16[64,8], i: s32[]) -> bf16[8,16] {
  %x = bf16[64,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %whole = bf16[64,8]{1,0} all-reduce(%x), channel_id=1, replica_groups=[1,4]<=[4], to_apply=%add
  %turned = bf16[8,64]{0,1} transpose(%whole), dimensions={1,0}
  %part = bf16[8,16]{1,0} dynamic-slice(%turned, %i, %i), dynamic_slice_sizes={8,16}
  %all = bf16[8,16]{1,0} all-reduce(%part), channel_id=2, replica_groups=[1,4]<=[4], to_apply=%add
  ROOT %used = bf16[8,16]{1,0} add(%all, %part)
}
"""
    once, again = 0.75 * 2 * 64 * 8, 0.75 * 2 * 8 * 16
    sent = {kind: sent for kind, (_, sent) in collectives.count(text, 4).by_kind().items()}
    assert sent == {"all-reduce": 2 * once + 2 * again}
    found = collectives.count(text, 4, partitioned=True).by_kind()
    assert found == {"reduce-scatter": (1, once), "all-reduce": (1, 2 * again)}


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
    assert trips(rise="1") == 3 and trips(rise="3") == 2  # unrolled
    noted = ', backend_config={"known_trip_count":{"n":"11"}}'
    assert trips(trips=noted) == 11
    unknown = program().replace("direction=LT", "direction=NE")
    once, often = (collectives.count(unknown, 8, loops=loops) for loops in (1.0, 1.5))
    assert once.unknown_loops == often.unknown_loops == 1 and often.loops == 1.5
    never = collectives.count(unknown, 8, loops=0.0)
    assert once.sent > never.sent > 0
    assert often.sent - once.sent == pytest.approx(0.5 * (once.sent - never.sent))


def test_no_line_of_a_program_is_passed_over():
    """Of a kernel whose attributes take several lines, neither it nor what follows."""
    body = hlo.parse(program()).computations["body"]
    assert "metadata" in body["kernel"].attributes and body["next"].is_root
    with pytest.raises(ValueError, match=r"no instruction .*: ROOT %sum = f32"):
        hlo.parse(program().replace("add(%x, %y)", "add of %x, %y"))
    with pytest.raises(ValueError, match=r"of no computation: %begun"):
        hlo.parse(program().replace("  %begun", "}\n  %begun"))


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


@pytest.mark.parametrize("machine", ["v5p:2x2x2", "v5e:4x4"])
def test_weights_over_two_axes_are_gathered_once_and_summed_into_shards(machine):
    """As `layout.gather` has it; with both axes at once all-reduces send more than this."""
    mesh = meshes.make({"data": 1, "fsdp": -1, "context": 2}, tpu_chips(machine))
    at = NamedSharding(mesh, PartitionSpec(("fsdp", "context")))
    by_tokens = NamedSharding(mesh, PartitionSpec("fsdp", "context"))

    layer = rematerialised(lambda x, w: (jnp.tanh(x @ gather(w, at)), None), "full")

    def loss(weights, x):
        return jax.lax.scan(layer, x, weights)[0].sum()

    layers = NamedSharding(mesh, PartitionSpec(None, ("fsdp", "context")))
    weights = jax.ShapeDtypeStruct((3, 1024, 1024), jnp.bfloat16, sharding=layers)
    x = jax.ShapeDtypeStruct((8, 4096, 1024), jnp.bfloat16, sharding=by_tokens)
    compiled = jax.jit(jax.grad(loss), out_shardings=layers).lower(weights, x).compile()
    sent = collectives.count(compiled.as_text(), mesh.size).by_kind()
    once = 3 * 2 * 1024 * 1024 * (1 - 1 / mesh.size)
    assert sent["all-gather"][1] == 2 * once  # backward too
    assert sent["reduce-scatter"][1] == once
    assert sum(bytes_sent for _, bytes_sent in sent.values()) < 3.1 * once


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


CONFIG_DMD2 = """
from ml_collections import ConfigDict
from configs import digits_dmd2

def get_config():
    config = digits_dmd2.get_config()
    config.model = "tiny"
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "context": 1, "exchange": "auto"})
    config.evaluate.update({"height": 32, "width": 32, "num_frames": 5})
    config.distill.update({"batch_size": 2, "remat": "full"})
    return config
"""
CONFIG = """
from ml_collections import ConfigDict
from configs import digits

def get_config():
    config = digits.get_config()
    config.model = "tiny"
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "context": 2, "exchange": "auto"})
    config.evaluate.update({"height": 32, "width": 32, "num_frames": 5})
    changes = {"target": 1, "objective": "mse", "optimizer": "adamw", "remat": "none"}
    config.transfer.update({"batch_size": 2, **changes})
    return config
"""


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    """plan("v5e:2x2", "--config.x=y", ...) -> (exit code, stdout, stderr) of train.py --plan.

    One layer of two heads; that nothing is written is checked.
    """
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 48, "text_dim": 24}
    tiny = replace(registry.wan_digits(), transformer=WanConfig(num_layers=1, freq_dim=32, **sizes))
    monkeypatch.setitem(registry.MODELS, "tiny", lambda: tiny)
    (tmp_path / "config.py").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)

    def plan(machine, *flags, config="config.py"):
        code = train.main(["train.py", f"--config={config}", f"--plan={machine}", *flags])
        written = [path.name for path in tmp_path.rglob("*") if "__pycache__" not in path.parts]
        assert written == ["config.py"]
        return code, *capsys.readouterr()

    return plan


HELD = {"student's weights": 100, "optimiser": 200, "teacher": 50}
NOTHING = dict.fromkeys(("mixed", "rounded"), collectives.Communication((), 0))


def test_plan_for_a_slice_that_is_not_here(plan):
    code, out, err = plan("v5e:2x2")
    assert (code, err) == (0, "")
    for words in (
        "tiny, 32 x 32 x 5: 8 tokens; 1 of 1 layers linear",
        "machine: v5e:2x2, 4 x v5e; mesh data:2, fsdp:1, context:2, exchange ulysses",
        "of 15.8: fits",
        "largest batch that fits",
        "time: a model, not a measurement",
        "collection: 4,096 videos of 50 guided steps",
    ):
        assert words in out
    calls = {kind: int(count) for kind, count in re.findall(r"(\w+) +all-to-all +(\d+) calls", out)}
    # q, k, v and the output of the mixed layer, in both directions; the rounded one is linear and
    # has none. What else is sent in this way is the same in both.
    assert calls["mixed"] - calls["rounded"] == 8


def test_simulated_devices_compile_in_a_process_of_their_own(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG.replace('"tiny"', '"wan_digits"'))
    config = config_files.load(str(tmp_path / "config.py"))
    (made,) = simulated.compile_updates(config, 2, (2,))
    assert made.batch_size == 2 and made.peak > made.kept > 0
    calls = {name: sent.by_kind()["all-to-all"][0] for name, sent in made.sent.items()}
    assert calls["mixed"] > calls["rounded"] > 0
    # 8 kernels of each of 12 layers (both devices have the text's keys whole); the CPU's own
    # program has no reduce-scatter.
    assert made.sent["mixed"].by_kind()["reduce-scatter"][0] >= 12 * 8


def test_one_simulated_device_has_no_partitioner(plan):
    """`plan`: for the tiny model."""
    config = config_files.changed(config_files.load("config.py"), {"mesh.context": 1})
    mesh = meshes.make({}, jax.devices()[:1])
    made = compile_updates(config, mesh, "cpu", 2, simulated=True)
    assert made.peak > made.kept > 0 and made.sent["mixed"].by_kind() == {}


def test_plan_for_gpus_that_are_not_here(plan, monkeypatch):
    made = Compiled(2, HELD, 900, NOTHING, "", 1.0)

    def compiled(config, count, batches):
        return [replace(made, batch_size=batch_size) for batch_size in batches]

    monkeypatch.setattr(simulated, "compile_updates", compiled)
    code, out, _ = plan("h100:4")
    assert code == 0 and "machine: h100:4, 4 x h100; mesh data:2" in out
    assert "peak (formula)" in out and "peak (CPU compiler)" in out and "of 68.5: fits" in out
    # By the formula, as the peak: the CPU's two are alike.
    largest = int(re.search(r"largest batch that fits: about (\d+) ", out)[1])
    assert plan("h100:4", f"--config.transfer.batch_size={largest}")[0] == 0
    assert plan("h100:4", f"--config.transfer.batch_size={largest + 2}")[0] == 1


@pytest.mark.parametrize(
    ("machine", "flags", "message"),
    [
        ("v9:4x4", (), "--plan=v9:4x4 names no chip that is known; choose v5e"),
        ("v5p", (), "names no shape of a v5p slice, which has 3 sides: write v5p:4x4x4"),
        ("v5p:4x4", (), "names no shape of a v5p slice"),
        ("v5e:3x3", ("--config.mesh.context=1", "--config.transfer.batch_size=9"), "--plan=v5e:3x3 "
         "is no slice that TPU's compiler knows"),
        ("h100:0", (), "names no number of GPUs: write h100:8"),
        ("h100:many", (), "names no number of GPUs"),
        ("v5e:2x2", ("--config.mesh.context=3",), "does not divide the 4 devices"),
        ("v5e:2x2", ("--config.mesh.data=4",), "the mesh data:4, fsdp:1, context:2 does not "
         "multiply to the 4 devices"),
        ("v5e:2x2", ("--config.transfer.batch_size=3",), "batches of 3 cannot be shared evenly"),
        ("v5e:2x2", ("--config.mesh.context=4", "--config.mesh.exchange=ulysses"), "Ulysses shares "
         "2 heads between context:4 devices"),
        ("v5e:2x2", ("--config.model=wan3",), "model 'wan3' is unknown"),
        ("v5e:2x2", ("--config.transfer.objective=magic",), "transfer.objective is 'magic'"),
    ],
)  # fmt: skip
def test_bad_input(plan, machine, flags, message):
    code, out, err = plan(machine, *flags)
    assert (code, out) == (2, "")
    assert message in err and err.startswith("error: ") and err.count("\n") == 1


def test_configuration_without_a_stage_that_is_planned(plan):
    root = Path(train.__file__).parent
    code, _, err = plan("v5e:2x2", config=root / "configs/digits_pretrain.py")
    assert code == 2 and "has neither a transfer nor a distill stage, and only these" in err


def test_what_does_not_fit_says_what_to_change(plan, monkeypatch):
    """A chip of half a kilobyte, and a program that the compiler refused."""
    made = Compiled(2, HELD | {"batch": 10}, 900, {}, "", 1.0)
    monkeypatch.setattr(planned, "compile_updates", lambda *given: made)
    monkeypatch.setitem(chips.CHIPS, "v5e", replace(chips.CHIPS["v5e"], hbm=512))
    code, out, _ = plan("v5e:2x2", "--config.transfer.remat=products")
    assert code == 1 and "DOES NOT FIT" in out
    assert "Change one of: --config.transfer.remat=full" in out
    assert "not known: the compiler refused the program" in out
    monkeypatch.setitem(chips.CHIPS, "v5e", replace(chips.CHIPS["v5e"], hbm=256))
    code, out, _ = plan("v5e:2x2")
    assert code == 1 and "weights, optimiser and teacher alone" in out


def test_largest_batch_lies_on_the_line_through_two(plan, monkeypatch):
    def compiled(config, mesh, platform, batch_size):
        return Compiled(batch_size, HELD, 400 + 10 * batch_size, NOTHING, "", 1.0)

    monkeypatch.setattr(planned, "compile_updates", compiled)
    monkeypatch.setitem(chips.CHIPS, "v5e", replace(chips.CHIPS["v5e"], hbm=512))
    code, out, _ = plan("v5e:2x2")
    assert code == 0 and "largest batch that fits: about 10 (a line through batches 2 and 4)" in out
    code, out, _ = plan("v5e:2x2", "--config.transfer.batch_size=24")
    assert code == 1 and "--config.transfer.accumulate=3; --config.transfer.batch_size=10" in out


def test_plan_of_a_distillation(plan, tmp_path, monkeypatch, capsys):
    """Both updates of the tiny model, compiled for this machine's device with one batch."""
    (tmp_path / "config.py").write_text(CONFIG_DMD2)
    config = config_files.load("config.py")
    made = compile_updates(config, meshes.make({}, jax.devices()[:1]), "cpu", 2)
    assert list(made.sent) == ["generator", "fake score"] and made.peak > made.kept
    # The way to the step that is trained has a length of its own each time.
    assert all((one.unknown_loops, one.loops) == (1, 1.5) for one in made.sent.values())
    held = made.held
    assert held["its average"] == held["generator's weights"]
    # Two moments for each weight, in float32 as it is; the fake score has no feature maps.
    assert held["its optimiser"] == pytest.approx(2 * held["generator's weights"], rel=0.01)
    assert held["fake score, its optimiser"] < 3 * held["generator's weights"]

    def compiled(config, count, batches):
        return [replace(made, batch_size=batch_size) for batch_size in batches]

    monkeypatch.setattr(simulated, "compile_updates", compiled)
    code, out, err = plan("h100:2", "--config.distill.start_steps=100")
    assert (code, err) == (0, "") and "collection" not in out
    for words in (
        "tiny, 32 x 32 x 5: 8 tokens; 0 of 1 layers linear (assumed)",
        "updates: DMD2 to 4 steps, batch 2 in 1 part, adamw, remat full",
        "the generator at one step of 2",
        "machine: h100:2, 2 x h100; mesh data:2",
        "(1 of unknown length counted 1.5 times)",
        "100 + 950 + 2,000 updates",
        "peak (formula)",
    ):
        assert words in out
    row = plans.row(planned.make(config, "h100:2", say=lambda text: None))
    assert row["collection"] is None and row["held"] == made.kept
    monkeypatch.setitem(chips.CHIPS, "h100", replace(chips.CHIPS["h100"], hbm=made.kept * 1.1))
    code, out, _ = plan("h100:2")
    assert code == 1 and "--config.mesh.context=2" in out
    one_stage = "--config.distill.one_stage=True"
    assert "one_stage is not planned" in plan("h100:2", one_stage)[2]


@pytest.mark.parametrize(("seen", "peak"), [((3,), 24_000), ((2,), 20_000), ((2, 3), 24_000)])
def test_a_peak_counts_what_its_program_does_not_see(monkeypatch, seen, peak):
    """Programs that see 3 or 2 of the 3 arrays that are held, and write what they see anew."""
    mesh = meshes.make({}, jax.devices()[:1])
    arrays = rehearsal.everywhere([jax.ShapeDtypeStruct((1000,), jnp.float32)] * 3, mesh)
    update = jax.jit(lambda recipe, *given: [x + 1 for x in given], static_argnums=0)

    class Two:
        def recipe(self, mesh, batch_size):
            return None

        def programs(self, recipe, mesh):
            return [Program(update, (*arrays[:count],), {"": (0, 0, 1)}) for count in seen]

        def held(self, programs):
            return {"arrays": 12_000}

    monkeypatch.setattr(compiled.stages, "of", lambda config: Two())
    assert compile_updates(None, mesh, "cpu", 1).peak == pytest.approx(peak, abs=600)


def test_table_of_plans(tmp_path, capsys):
    one = {
        "mesh": {"data": 1, "fsdp": 4, "context": 16}, "batch_size": 4, "held": 3 * chips.GIB,
        "peak": 27 * chips.GIB, "limit": 15.75 * chips.GIB, "by_formula": False, "fits": False,
        "largest_batch": 0, "flops": 2.5961e15, "sent": None, "step": (96.2, 176.4),
        "training": (86_400, 864_000), "collection": (8640, 17_280),
    }  # fmt: skip
    assert plans.table({"wan14b v5e:8x8": one | {"collection": None}}).endswith("| 1 to 10 |  |")
    assert plans.table({"wan14b v5e:8x8 --config.mesh.context=16": one}).splitlines()[2] == (
        "| wan14b v5e:8x8 mesh.context=16 | 1 x 4 x 16 | 4 | 3.0 | 27.0 | 15.8 | no | none | 2,596 "
        "|  | 96 to 180 | 1 to 10 | 0.1 to 0.2 |"
    )
    assert plans.main(["plans.py", f"--out={tmp_path}/plans.json", "--only=v9:1"]) == 2
    assert "--only=v9:1: choose one of h100:32, h100:64, h100:8, v5e:4x4" in capsys.readouterr().err


def test_without_the_compiler_of_tpus(plan, monkeypatch):
    monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
    assert 'pip install -e ".[tpu]"' in plan("v5e:2x2")[2]


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space "
         "hbm. Used 24.50G of 15.75G hbm. Exceeded hbm capacity by 8.75G.", 24.5 * 2**30),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
         "temporaries (25.00G) exceeds available HBM (15.75G).", 25 * 2**30),
        ("INTERNAL: something else", None),
    ],
)  # fmt: skip
def test_what_a_refused_program_needs(message, wanted):
    assert refused(message) == wanted


@pytest.mark.parametrize("name", ["wan1_3b", "wan14b", "smoke"])
def test_configurations_have_every_field_of_the_first_one(name):
    """Stages read fields that configs/digits.py has: a new one there has to come here, too."""
    whole = config_files.load("configs/digits.py")
    config = config_files.load(f"configs/{name}.py")
    for group in ("collect", "transfer", "evaluate"):
        if name != "smoke" or group != "evaluate":
            assert set(whole[group]) <= set(config[group])
    assert {"data", "fsdp", "context"} <= set(config.mesh)
