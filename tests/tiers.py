"""Which rows of long tests run on every change: the others try more of the same.

Where rows try one thing in many settings, those that differ most are kept here. All run
at night, with `pytest -m ""` and for the tables of faults and goals. A test that is
nightly as a whole is marked so.
"""

import collections
import fnmatch

# File, function: patterns of the ids that are kept.
KEPT: dict[str, dict[str, tuple[str, ...]]] = {
    "faults/test_checkpoints.py": {
        "test_F7_F8_no_flipped_bit_anywhere_is_loaded": ("0",),
    },
    "faults/test_hostile.py": {
        "test_G1_G2_no_checkpoint_of_a_stranger_does_harm": ("0",),
    },
    "faults/test_position.py": {
        "test_D3_right_orders_leave_exact_zeros_and_raise_no_alarm": (
            *("adamw", "lion", "clip, adamw", "adafactor", "apply_every"),
            *("MultiSteps", "partition", "inject", "inner", "inner, regrow"),
        ),
    },
    "shrink/test_shrink_fuzz.py": {
        "test_what_is_prunable_is_cut_exactly": ("0",),
    },
    "shrink/test_shrink_units.py": {
        "test_every_criterion_prunes_whole_units": ("Movement", "Magnitude", "Fisher"),
    },
    "shrink/test_shrink_zoo.py": {
        "test_each_group_alone_is_cut_exactly": (
            *("mlp", "cnn", "nnx_*", "gqa_decoder", "vit_fused_qkv", "squeeze_excite"),
        ),
        "test_gradients_are_those_of_the_masked_model": ("gqa_decoder_scan", "own_*"),
    },
    "test_allocation.py": {
        "test_every_layer_has_a_threshold_of_its_own": (
            *("2147483647-layer_*d+-*", "2147483647-.[*]-*", "5-up|down-*"),
        ),
    },
    "test_aot.py": {
        "test_train_step_leaves_masks_alone_in_place": ("Uniform*",),
        "test_train_step_takes_no_memory_of_its_own": ("Uniform*",),
        "test_looking_for_bad_steps_takes_one_leaf_of_memory": ("h200 *",),
        "test_prune_takes_no_memory_of_its_own": ("Global*",),
        "test_whole_rows_and_units_leave_masks_alone_in_place": ("axis-*", "*-h200 *"),
        "test_train_step_on_four_devices_exchanges_counts_only": ("*Explicit-*",),
        "test_train_step_on_four_devices_takes_no_memory": ("*Explicit-*",),
        "test_prune_on_four_devices_exchanges_counts_only": ("*Auto-*",),
        "test_prune_takes_hardly_more_memory_for_a_larger_model": ("h200 *",),
        "test_flax_train_step_updates_its_state_in_place": ("h200 *",),
        "test_blocks_take_memory": ("4x8-*",),
        "test_other_forms_of_the_train_step": (
            *("packed-* 1x1", "Movement-* 1x1", "check_finite-* 1x1", "blocks-* 1x1"),
            *("2:4-* 2x2", "columns-* 2x2"),
        ),
        "test_in_no_shape_are_kernels_copied": ("EmaMagnitude-* 1x1", "Global-* 2x2"),
        "test_cheaper_scores_take_no_memory_either": ("both-*",),
        "test_a_billion_params_on_four_devices": ("prune-*", "*-h200 *"),
    },
    "test_contract.py": {
        # Every wrapper around one form, and every form by itself.
        "test_the_state_is_found_and_reaches_the_sparsity": (
            "* | chain | *",
            "* | plain",
        ),
        "test_prune_works_through_it": ("* | chain | *", "* | plain"),
        "test_unknown_extra_arguments_are_ignored": (
            *("* | chain | *", "Movement | inner, regrow | plain", "RigL *"),
        ),
        "test_init_has_the_shapes_that_eval_shape_says": (
            *("EmaMagnitude* | chain | *", "* | inner, regrow | plain", "RigL *"),
        ),
    },
    "test_dtypes.py": {
        "test_scores_are_float32": ("bfloat16-*", "float16-ema"),
    },
    "test_exchange.py": {
        "test_what_the_optimizer_remembers_of_grown_weights_is_as_at_first": (
            *("adamw", "adafactor, factored"),
        ),
        "test_counts_stay_and_grown_weights_start_at_zero_then_move": (
            *("RigL-bfloat16", "SET-float32"),
        ),
        "test_ties_go_to_the_lower_index_and_nan_is_never_grown": ("0", "1"),
        "test_in_multi_steps_an_exchange_counts_updates": ("RigL",),
    },
    "test_growth.py": {
        "test_sixty_steps_equal_numpy": ("RigL-momentum", "SET without an end-adam"),
    },
    "test_manual_axes.py": {
        "test_parts_on_several_devices_are_ranked_as_one": (
            *("global", "global, per layer", "per path, regrow"),
        ),
    },
    "test_multidevice.py": {
        "test_training_gives_the_masks_of_one_device_and_keeps_the_layout": (
            *("auto-ema", "explicit, set-rigl", "explicit, set-soft"),
        ),
        "test_one_threshold_over_all_tensors_is_that_of_a_sort": (
            *("auto-rows", "auto-layers", "explicit-columns", "explicit-both"),
            *("explicit-replicated", "explicit-layers on all"),
        ),
        "test_thresholds_of_layers_are_those_of_one_device": ("explicit",),
        "test_pruning_works_without_jit": ("auto",),
    },
    "test_multiprocess.py": {
        "test_what_two_processes_saved_is_restored_on_another_mesh": (
            "with a manifest-transposed",
        ),
    },
    "test_packing.py": {
        "test_training_is_the_same_bit_for_bit": ("regrow", "exchanging"),
    },
    "test_position.py": {
        "test_before_an_optimizer_pruned_weights_are_still_driven_to_zero": (
            *("sgd-at once", "sgd(1)-*", "momentum-in steps", "adam-every step"),
            *("adamw-at once", "lion-in steps", "rmsprop-every step"),
        ),
    },
    "test_prune.py": {
        "test_the_debugging_modes_of_jax_find_nothing": ("Global*",),
    },
    "test_report.py": {
        "test_reports_on_sharded_params_are_those_of_one_device": ("Explicit",),
    },
    "test_rounding.py": {
        "test_every_mesh_gives_the_bits_of_one_device": (
            *("(None, *Explicit-ema, every 3", "('y',)-*Auto-taylor"),
        ),
        "test_a_restart_changes_no_bit": ("ema, every 3",),
        "test_reports_read_them": ("taylor", "ema, every 3"),
        "test_scores_take_two_bytes_a_weight_and_keep_their_dtype": ("bfloat16-*",),
        "test_at_90_percent_nearly_the_same_weights_are_kept": ("0.01-0.9",),
    },
    "test_soft.py": {
        "test_a_target_is_reached_on_handwritten_digits": ("0.97-0.1",),
        "test_a_target_is_reached_on_generated_data": ("0.5", "0.97"),
        "test_equal_scores_do_not_make_it_miss_the_target": ("0.5",),
    },
    "test_state.py": {
        "test_scores_stay_finite_even_when_apply_if_finite_gives_up": (
            *("chain-*-1", "inner-*-3"),
        ),
    },
    "test_structure.py": {
        "test_on_a_mesh_masks_are_those_of_one_device": ("explicit",),
        "test_a_change_of_groups_moves_sums_and_counts_between_devices": ("auto",),
    },
}


# Ids of all rows that are there, by file and function: noted when they are collected.
SEEN: dict[tuple[str, str], set[str]] = collections.defaultdict(set)


def is_nightly(path: str, function: str, id: str) -> bool:
    """Whether a row is not among those that are kept.

    Args:
      path: of the file, from the tests' folder.
      function: name of the test.
      id: of its row; empty if it has none.
    """
    kept = KEPT.get(path, {}).get(function)
    return kept is not None and not any(fnmatch.fnmatchcase(id, x) for x in kept)
