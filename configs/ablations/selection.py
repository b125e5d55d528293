"""How the layers are chosen, at 50% and 67% of them.

python train.py --config=configs/ablations/selection.py --workdir=runs/ablations/selection

The paper: selective transfer before layers chosen by hand, before a grid search. The profile, which
the grid takes, is measured once for all rows (11 ranges of 100 updates, each sampled). A row took
an H200 under a minute of training (docs/results.md) and half a minute of evaluation.
benchmarks/tables.py also draws which layers were chosen.
"""

from ml_collections import ConfigDict

from configs.ablations import common

BY_HAND = {
    6: {
        "first": tuple(range(6)),
        "last": tuple(range(6, 12)),
        "alternate": tuple(range(1, 12, 2)),
    },
    8: {
        "first": tuple(range(8)),
        "last": tuple(range(4, 12)),
        "alternate": (1, 2, 4, 5, 7, 8, 10, 11),
    },
}


def get_config() -> ConfigDict:
    config = common.get_config()
    config.stages = ("collect", "profile", "transfer", "evaluate")
    rows = []
    for target, by_hand in BY_HAND.items():
        of = {"transfer.target": target}
        rows += [
            (f"selective_{target}", of),
            (f"selective_rewound_{target}", {**of, "transfer.rewind": True}),
            (f"grid_{target}", {**of, "transfer.selection": "grid"}),
        ]
        for name, layers in by_hand.items():
            manual = {"transfer.selection": "manual", "transfer.layers": layers}
            rows.append((f"{name}_{target}", {**of, **manual}))
        for seed in (0, 1):
            random = {"transfer.selection": "random", "transfer.selection_seed": seed}
            rows.append((f"random_{target}_{seed}", {**of, **random}))
    config.sweep = tuple(rows)
    config.sweep_seeds = (0, 1, 2)
    return config
