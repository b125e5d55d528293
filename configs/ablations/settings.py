"""Settings that the tables share, chosen on other prompts and noise than the tables are made on.

python train.py --config=configs/ablations/settings.py --workdir=runs/ablations/settings

Half of wan-digits' layers, as in the other tables; each row changes what it is named after.
"""

from ml_collections import ConfigDict

from configs.ablations import common, selection


def get_config() -> ConfigDict:
    config = common.get_config()
    mse = {"transfer.objective": "mse"}
    alternate = selection.BY_HAND[6]["alternate"]
    own = {"transfer.objective": "own_points", "transfer.own_share": 0.5, "transfer.own_steps": 1}
    config.sweep = (
        ("mse", mse),
        ("mse_rate_3e-3", {**mse, "transfer.learning_rate": 3e-3}),
        ("mse_rate_1e-2", {**mse, "transfer.learning_rate": 1e-2}),
        ("mse_rate_3e-4", {**mse, "transfer.learning_rate": 3e-4}),
        ("mse_negative_third", {**mse, "transfer.negative_fraction": 0.33}),
        ("mse_maps_10", {**mse, "transfer.feature_map_rate": 10.0}),
        ("mse_rewound", {**mse, "transfer.rewind": True}),
        ("mse_rewound_round_500", {**mse, "transfer.rewind": True, "transfer.round_at": 500}),
        ("mse_alternate", {**mse, "transfer.selection": "manual", "transfer.layers": alternate}),
        ("mse_4500", {**mse, "transfer.num_steps": 4500}),
        ("mse_4500_rate_3e-3", {**mse, "transfer.num_steps": 4500, "transfer.learning_rate": 3e-3}),
        ("own_next", own),
        ("own_few", {**own, "transfer.own_steps": 4}),
        ("own_few_rewound", {**own, "transfer.own_steps": 4, "transfer.rewind": True}),
        ("own_whole", {**own, "transfer.own_steps": 20}),
        ("own_whole_fifth", {**own, "transfer.own_steps": 20, "transfer.own_share": 0.2}),
        ("own_whole_rate_3e-3", {**own, "transfer.own_steps": 20, "transfer.learning_rate": 3e-3}),
    )
    evaluate = config.evaluate
    evaluate.prompts = "assets/prompts_digits_validation.txt"
    evaluate.num_prompts = 128
    evaluate.seeds = (10, 11, 12)
    return config
