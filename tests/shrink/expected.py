"""What must be found in the models of the zoo: worked out by hand from their code."""

LSTM, GRU = "params/LSTMCell_0", "params/GRUCell_0"

# model -> {prunable group: units}. All else is pinned or in INEXACT.
PRUNABLE = {
    "mlp": {
        "params/Dense_0/kernel:1": 12,
        "params/Dense_1/kernel:1": 8,
        "params/Dense_2/kernel:1": 6,
    },
    # The stem's 8 channels are 4 groups of 2 further on.
    "cnn": {
        "params/b/kernel:3[0]": 4,
        "params/b/kernel:3[1]": 2,
        "params/a/kernel:3": 8,
        "params/grouped/kernel:3[1]": 3,
        "params/mix/kernel:3": 10,
        "params/side/kernel:3": 6,
    },
    "group_norm": {"params/conv/kernel:3[0]": 3, "params/conv/kernel:3[1]": 4},
    "linen_transformer": {
        "params/block_0/attention/out/kernel:2": 16,
        **{
            f"params/block_{i}/{name}": size
            for i in (0, 1)
            for name, size in {
                "attention/key/bias:0": 4,
                "attention/key/bias:1": 4,
                "attention/value/bias:1": 4,
                "up/kernel:1": 24,
            }.items()
        },
    },
    "linen_scan_remat": {
        "params/blocks/LayerNorm_0/bias:1": 16,
        "params/blocks/attention/key/bias:1": 4,
        "params/blocks/attention/key/bias:2": 4,
        "params/blocks/attention/value/bias:2": 4,
        "params/blocks/up/bias:1": 24,
    },
    "nnx_transformer": {
        "attention/key/bias:0": 4,
        "attention/key/bias:1": 4,
        "attention/value/bias:1": 4,
        "up/kernel:1": 24,
    },
    "nnx_cnn": {"conv/kernel:3": 8},
    "equinox_mlp": {"layers/1/weight:1": 10, "layers/2/weight:1": 10},
    "equinox_attention": {
        "attention/output_proj/weight:1[0]": 4,
        "attention/query_proj/weight:0[1]": 4,
        "attention/output_proj/weight:1[1]": 4,
    },
    # Groups of keys and values, queries of each, pairs of RoPE, values, FFN, stream.
    "gqa_decoder": {
        "embed/table:1": 16,
        "layer/gate_up:1": 20,
        "layer/wk:1[0]": 2,
        "layer/wk:1[1]": 4,
        "layer/wq:1[1]": 2,
        "layer/wv:1[1]": 6,
    },
    "gqa_decoder_scan": {
        "embed/table:1": 16,
        "layers/gate_up:2": 20,
        "layers/wk:2[0]": 2,
        "layers/wk:2[1]": 4,
        "layers/wq:2[1]": 2,
        "layers/wv:2[1]": 6,
    },
    "library_attention": {"wk:1[0]": 2, "wk:1[1]": 6, "wq:1[1]": 2, "wv:1[1]": 6},
    "linen_rnn": {f"{GRU}/hn/kernel:1": 8, f"{LSTM}/hf/kernel:1": 10},
    "fused_lstm": {"w:1": 8},
    "vit_fused_qkv": {"up:1": 20, "qkv:1[0]": 4, "qkv:1[1]": 4},
    "unet": {
        "params/down1/kernel:3": 6,
        "params/down2/kernel:3": 8,
        "params/middle/kernel:3": 10,
        "params/up/kernel:3": 6,
    },
    "squeeze_excite": {
        "params/project/kernel:3": 4,
        "params/depthwise/kernel:3": 12,
        "params/squeeze/kernel:1": 5,
    },
    "mixer": {"t1:1": 10},
    "pixel_shuffle": {"a:1[2]": 6},
    "mamba": {"into:1": 10, "a:1": 4},
    "mixture_of_experts": {"down:0": 4, "up:2": 10},
    "seq2seq": {"enc_out:1": 8, "enc:1": 12, "k:1": 6, "v:1": 10},
    "densely_connected": {"a:1": 4, "b:1": 5, "c:1": 6},
    "branches": {"w:1": 8, "a:1": 8},
    "own_derivatives": {"a:1": 8, "b:1": 6},
    "low_rank": {"down:1": 3, "up:1": 8},
}

# Where a mean is subtracted over the stream (in two passes, or from what a bias made
# other than zero), removed units would still count.
INEXACT = {"vit_fused_qkv": {"cls:1"}, "mixer": {"embed:1"}}
