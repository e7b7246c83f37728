"""Sentences of README and docs whose numbers come from records; `test_numbers.py` compares them."""

from typing import NamedTuple

WHICH, BILEVEL = "docs/which_method.md", "docs/bilevel.md"
BENCHMARKS = "benchmarks/README.md"


class Sentence(NamedTuple):
    page: str
    record: str
    numbers: dict[str, str]  # paths as in benchmarks/_reproduction_rows.py
    text: str


SENTENCES = (
    Sentence(
        WHICH,
        "unrolled",
        {
            "a": "rate per step/momentum, reversible/wall_s",
            "b": "rate per step/momentum, unroll/wall_s",
        },
        "{a / b:.1f} times `unroll`",
    ),
    Sentence(
        WHICH,
        "stn_overhead",
        {
            "lstm": "results/lstm/gates on outputs, 32/time_ratio",
            "penalized": "results/dense-l2/gates on outputs, 128/time_ratio",
        },
        "{lstm:.1f} to {penalized:.1f} times each training step, twice the parameters",
    ),
    Sentence(
        WHICH,
        "hyperband",
        {"ratio": "halving/compute_ratio"},
        "for 27 candidates a {'ninth' if ratio == 9 else ratio} of their steps",
    ),
    Sentence(
        BILEVEL,
        "bilevel_curves",
        {"saba": "problems/quadratic/algorithms/saba/final/*"},
        "converges to the solution ({median(saba[0]):.0e})",
    ),
    Sentence(
        BILEVEL,
        "bilevel_curves",
        {"passes": "problems/cleaning/passes_budget"},
        "this budget of {passes} passes",
    ),
    Sentence(
        BENCHMARKS,
        "implicit",
        {
            "error": "seeds/4 probes, 15 iterations/median",
            "most": "seeds/4 probes, 15 iterations/max",
        },
        "error {error * 1e6:.0f}e-6 (the median of 20 probe seeds; at most {most * 1e6:.0f}e-6)",
    ),
    Sentence(
        BENCHMARKS,
        "unrolled",
        {
            "ours": "rate per step/unroll binomial/wall_s",
            "theirs": "rate per step/equinox, 10 checkpoints/wall_s",
            "bytes": "rate per step/unroll binomial/temp_bytes",
            "more": "rate per step/equinox, 10 checkpoints/temp_bytes",
        },
        "takes {ours / theirs:.2f} of the time and {bytes / more:.2f} of the bytes of equinox's "
        "checkpointed scan",
    ),
    Sentence(
        BENCHMARKS,
        "maid_least_squares",
        {"certificates": "rows/*/certificates"},
        "at all {sum(certificates):,} certificates of least squares",
    ),
    Sentence(
        BENCHMARKS,
        "fedhyper",
        {"points": "points_at_smallest_rate"},
        "{points:.0f} points more",
    ),
    Sentence(
        BENCHMARKS,
        "stn_text",
        {
            "tuned": "perplexity/self-tuned from 0.05/test",
            "fixed": "perplexity/fixed 0.6/test",
            "replay": "perplexity/replay/test",
            "last": "perplexity/last value fixed/test",
        },
        "test perplexity {tuned:.1f}, the best of four fixed values {fixed:.1f}, the schedule "
        "replayed by an ordinary network {replay:.1f}, its last value fixed {last:.1f}",
    ),
    Sentence(
        BENCHMARKS,
        "stn_text_seven",
        {
            "tuned": "perplexity/self-tuned/test",
            "random": "perplexity/random search/test",
            "tpe": "perplexity/TPE/test",
        },
        "test perplexity self-tuned {tuned:.1f}, random search with three times its processor time "
        "{random:.1f}, TPE with as much {tpe:.1f}",
    ),
    Sentence(
        BENCHMARKS,
        "stn_mnist",
        {
            "stn": "summary/STN/test_loss",
            "delta": "summary/Delta-STN/test_loss",
            "random": "summary/random search/test_loss",
            "tpe": "summary/TPE/test_loss",
        },
        "test loss self-tuned {stn:.3f}, Delta-STN {delta:.3f}, random search {random:.3f}, TPE "
        "{tpe:.3f}",
    ),
    Sentence(
        BENCHMARKS,
        "stn_overhead",
        {
            "dense": "results/dense/gates on outputs, 128/time_ratio",
            "conv": "results/conv/gates on outputs, 128/time_ratio",
            "lstm": "results/lstm/gates on outputs, 32/time_ratio",
        },
        "takes {dense:.1f} times a plain one on a perceptron, {conv:.1f} times with convolutions, "
        "{lstm:.1f} times on an LSTM",
    ),
    Sentence(
        BENCHMARKS,
        "mip",
        {
            "before": "slopes/default/norm_of_weights",
            "after": "slopes/MIP/norm_of_weights",
            "gradient": "slopes/default/norm_of_gradient",
            "mended": "slopes/MIP/norm_of_gradient",
        },
        "is {before:.2f} without and {after:.3f} with it, of log norm(gradient) {gradient:.2f} and "
        "{mended:.2f}",
    ),
    Sentence(
        BENCHMARKS,
        "pbt_toy",
        {"rows": "rows/*/mean"},
        "{rows[0]:.3f}, {rows[1]:.3f}, {rows[2]:.4f}, {rows[3]:.4f} for neither, exploring, "
        "exploiting, both",
    ),
    Sentence(
        BENCHMARKS,
        "pb2",
        {"rows": "rows/*/mean"},
        "{rows[2]:.1f} with 4 members (PBT {rows[1]:.1f}, fixed {rows[0]:.1f}",
    ),
    Sentence(
        BENCHMARKS,
        "hyperband",
        {"regret": "counting_ones/rows/*/regret_mean/-1"},
        "regret after 400 budgets of DEHB {regret[2]:.3f}, Hyperband {regret[1]:.3f}, random "
        "search {regret[0]:.3f}",
    ),
    Sentence(
        BENCHMARKS,
        "srm",
        {"forecast": "r2/curve_and_traits", "seen": "r2/last_seen"},
        "R^2 of the forecast {forecast:.2f}, of the value last seen {seen:.2f}",
    ),
    Sentence(
        BENCHMARKS,
        "breadcrumbs",
        {
            "crumbs": "training/far/percent_of_tuned/breadcrumbs",
            "tasks": "training/far/percent_of_tuned/task arithmetic",
        },
        "({crumbs:.1f} and {tasks:.1f} percent of the tuned models",
    ),
    Sentence(
        BENCHMARKS,
        "autorl_protocol",
        {"bias": "bias", "t": "t_at_1"},
        "{bias[0]:.4f} in accuracy with one tuning seed (t = {t:.0f}), {bias[3]:.4f} with eight",
    ),
    Sentence(
        BENCHMARKS,
        "soups",
        {
            "uniform": "differences/uniform - best single, shifts/difference",
        },
        "uniform {uniform:.1f} points above the best single model under shifts",
    ),
    Sentence(
        BENCHMARKS,
        "vmapped",
        {
            "ridge": "results/ridge/*/speedup/vmapped",
            "softmax": "results/softmax regression/*/speedup/vmapped",
        },
        "{min(ridge):.0f} to {max(ridge):.0f} times as fast as 64 calls on the ridge regression, "
        "{min(softmax):.1f} to {max(softmax):.1f} times on softmax regression",
    ),
    Sentence(
        BENCHMARKS,
        "stn_digits",
        {
            "best": "verdicts/stn_over_best_fixed",
            "none": "verdicts/stn_over_none",
            "near": "verdicts/input_rates_median_width",
            "delta": "verdicts/delta_stn_over_best_fixed",
        },
        "{best:.2f} of the best of nine fixed rates (median validation loss), {none:.2f} of no "
        "dropout; four starts from 0.05 to 0.85 end within {near:.2f} of one another. Delta-STN: "
        "{delta:.2f}",
    ),
    Sentence(
        BENCHMARKS,
        "stn_cifar",
        {
            "a": "summary/Delta-STN/valid_loss",
            "b": "summary/random search/valid_loss",
            "c": "summary/random search/test_loss",
            "d": "summary/TPE/valid_loss",
            "e": "summary/TPE/test_loss",
            "f": "summary/STN/valid_loss",
            "g": "summary/STN/test_loss",
        },
        "Delta-STN {a:.3f} validation and test loss, random search {b:.3f} and {c:.3f}, TPE "
        "{d:.3f} and {e:.3f} with twice its time; STN {f:.2f} and {g:.2f}",
    ),
    Sentence(
        BENCHMARKS,
        "continual_digits",
        {
            "free": "rows/0/forgetting",
            "kept": "verdicts/chosen/perceptron/forgetting",
            "final": "verdicts/chosen/perceptron/final",
            "lstm": "verdicts/chosen/lstm/forgetting",
            "last": "verdicts/chosen/lstm/final",
        },
        "forgets {free:.2f} without the penalty and {kept:.4f} with it, at {100 * final:.1f} %; an "
        "LSTM with a twentieth of the parameters {lstm:.3f} at {100 * last:.1f} %",
    ),
    Sentence(
        BENCHMARKS,
        "continual_mnist",
        {"final": "rows/0/final"},
        "{100 * final:.1f} %, the paper's 97.87 % not reached",
    ),
    Sentence(
        BENCHMARKS,
        "global_best_response",
        {
            "found": "valid_loss/global hypernetwork, trained anew",
            "grid": "valid_loss/best of grid, one common penalty",
            "random": "valid_loss/best of random",
        },
        "validation loss {found:.3f}; the best of a grid over one common penalty {grid:.3f}, the "
        "best of as many random settings as its training pays for {random:.3f}",
    ),
    Sentence(
        BENCHMARKS,
        "unem_digits",
        {
            name: f"rows/0/test_accuracy/{key}"
            for name, key in (
                ("layer", "per layer"),
                ("shared", "shared"),
                ("grid", "grid"),
                ("soft", "soft k-means"),
            )
        },
        "layers of their own {layer:.3f}, one pair for all {shared:.3f}, grid {grid:.3f}, soft "
        "k-means {soft:.3f}",
    ),
    Sentence(
        BENCHMARKS,
        "shine",
        {
            "shine": "gradient_equivalents_to_1_percent/shine/*/median",
            "hoag": "gradient_equivalents_to_1_percent/hoag/*/median",
        },
        "{shine[0]:.0f} and {shine[1]:.0f} gradient-equivalents from either start, HOAG "
        "{hoag[0]:.0f} and {hoag[1]:,.0f}",
    ),
    Sentence(
        BENCHMARKS,
        "first_order",
        {"slope": "bias_of_f2sa/slope_from_10_on"},
        "slopes {max(slope):.3f} to {min(slope):.3f}",
    ),
    Sentence(
        BENCHMARKS,
        "multiplicity",
        {"a": "perceptrons/by error/ambiguity"},
        "ambiguity {a[1]:.2f}, {a[2]:.2f}, {a[3]:.2f} within 0.01, 0.02, 0.05",
    ),
    Sentence(
        BENCHMARKS,
        "carps_subset",
        {
            "star": "discrepancy",
            "least": "first_percentile_of_random",
            "tau": "tau",
            "chance": "tau_of_random_subsets",
        },
        "discrepancy {star:.3f}, the first percentile of random subsets {least:.3f}; Kendall's tau "
        "of rankings {tau:.2f}, of random subsets {chance:.2f}",
    ),
    Sentence(
        BENCHMARKS,
        "gtep",
        {"ewc": "judged_on/*/overestimate/EWC", "replay": "judged_on/*/overestimate/replay"},
        "EWC is overestimated by {ewc[0]:.3f} (Gaussian classes) and {ewc[1]:.3f} (Fashion), "
        "replay by {replay[0]:.3f} and {replay[1]:.3f}",
    ),
    Sentence(
        BENCHMARKS,
        "gp_ei",
        {"a": "rows/slice sampling/gaps/40", "b": "rows/greatest likelihood/gaps/40"},
        "gaps of {a * 1e5:.0f}e-5 with slice sampling, {b * 1e5:.0f}e-5 with the most likely "
        "length scales",
    ),
    Sentence(
        BENCHMARKS,
        "bo_rep",
        {
            "soba": "cleaning/methods/soba at 1000/upper",
            "bo_rep": "cleaning/methods/bo_rep/upper",
            "longer": "cleaning/methods/bo_rep, 18,000 calls/upper",
        },
        "SOBA's upper loss is {soba:.3f}, BO-REP's {bo_rep:.3f}, and {longer:.3f} with half as "
        "many calls again",
    ),
    Sentence(
        BENCHMARKS,
        "population_members",
        {"ratio": "ratio"},
        "{ratio:.2f} times the throughput of 256",
    ),
)
