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
        BILEVEL,
        "bilevel_curves",
        {"runs": "problems/quadratic/algorithms/maid/runs/*/passes"},
        "has taken {min(map(len, runs)) - 1} to {max(map(len, runs)) - 1} steps when the budget "
        "ends",
    ),
    Sentence(
        BILEVEL,
        "bilevel_curves",
        {"runs": "problems/a9a/algorithms/maid/runs/*/passes"},
        "has hardly begun ({min(map(len, runs)) - 1} to {max(map(len, runs)) - 1} steps)",
    ),
    # Each bullet of benchmarks/README.md, in this order and word for word.
    Sentence(
        BENCHMARKS,
        "implicit",
        {"seeds": "seeds", "cg": "rows/hyperjax, cg 20/error"},
        "Task A: with 20 products in all, error {seeds['4 probes, 15 iterations']['median'] * "
        "1e6:.0f}e-6 (the median of {seeds['4 probes, 15 iterations']['seeds']} probe seeds; at "
        "most {seeds['4 probes, 15 iterations']['max'] * 1e6:.0f}e-6), where CG without a "
        "preconditioner has {100 * cg:.0f}e-2; with 15 products at most {seeds['4 probes, 10 "
        "iterations']['max'] * 1e4:.0f}e-4.",
    ),
    Sentence(
        BENCHMARKS,
        "implicit",
        {"bars": "bars", "rows": "rows"},
        "Task A, time: 15 products take 1/{1 / bars['hyperjax, cg + jacobi, 15 products / "
        "optimistix, default']:.0f} of that of optimistix's default, 1/{1 / bars['hyperjax, cg + "
        "jacobi, 15 products / jaxopt, default']:.0f} of jaxopt's, 1/{1 / bars['hyperjax, cg + "
        "jacobi, 15 products / torchopt, default']:.0f} of torchopt's, which are more exact "
        "({rows['optimistix, default']['error'] * 1e7:.0f}e-7, {rows['jaxopt, default']['error'] "
        "* 1e5:.0f}e-5, {rows['torchopt, default']['error'] * 1e5:.0f}e-5); {rows['hyperjax, cg + "
        "jacobi, 15 products']['wall_s'] / rows['jaxopt, cg to 1e-4']['wall_s']:.2f} of that of "
        "jaxopt's CG to 1e-4 ({rows['jaxopt, cg to 1e-4']['error'] * 1e5:.0f}e-5). 20 take "
        "{[*bars.values()][0]:.2f} times that of the same algorithm and receipt by hand, "
        "{[*bars.values()][1]:.2f} times that of its faster form, forward over reverse, and "
        "{[*bars.values()][2]:.2f} times without a receipt.",
    ),
    Sentence(
        BENCHMARKS,
        "unrolled",
        {
            "rows": "rate per step",
            "shared": "shared rates",
            "back": "reversible temp_bytes by steps",
        },
        "Task B: `unroll` takes {rows['unroll']['wall_s'] / rows['scan by hand']['wall_s']:.2f} "
        "times the time of the scan by hand and as many bytes; `checkpoint='binomial'` "
        "{rows['unroll binomial']['wall_s'] / rows['equinox, 10 checkpoints']['wall_s']:.2f} of "
        "the time and {rows['unroll binomial']['temp_bytes'] / rows['equinox, 10 "
        "checkpoints']['temp_bytes']:.2f} of the bytes of equinox's checkpointed scan; "
        "`reversible` at most {max(back.values()) / 1e6:.1f} MB from 100 to 10,000 steps. One "
        "shared rate runs forward in {shared['1 shared, forward']['temp_bytes'] / 1e6:.1f} MB "
        "instead of {shared['1 shared, reverse']['temp_bytes'] / 1e6:.1f}, in {shared['1 shared, "
        "forward']['wall_s'] / shared['1 shared, reverse']['wall_s']:.2f} of the time; two take "
        "{shared['2 shared, forward']['wall_s'] / shared['2 shared, reverse']['wall_s']:.2f} "
        "times, four {shared['4 shared, forward']['wall_s'] / shared['4 shared, "
        "reverse']['wall_s']:.2f} times the time of reverse mode.",
    ),
    Sentence(
        BENCHMARKS,
        "vmapped",
        {
            "ridge": "results/ridge/*/speedup/vmapped",
            "softmax": "results/softmax regression/*/speedup/vmapped",
            "net": "results/perceptron, 32 hidden/*/speedup/vmapped",
            "chunks": "results/perceptron, 32 hidden/*/speedup/chunks",
        },
        "64 settings: vmapped they are {min(ridge):.0f} to {max(ridge):.0f} times as fast as 64 "
        "calls on the ridge regression, {min(softmax):.1f} to {max(softmax):.1f} times on softmax "
        "regression of digits. On a perceptron, whose 64 copies no longer fit into the cache, "
        "vmap takes {1 / max(net):.1f} to {1 / min(net):.1f} times as long as the calls, chunks "
        "of eight {1 / max(chunks):.1f} to {1 / min(chunks):.1f} times: that is what the `chunk` "
        "of `population` is for.",
    ),
    Sentence(
        BENCHMARKS,
        "maid_least_squares",
        {
            "ours": "rows/condition=20/median_iterations/maid/*",
            "fixed": "rows/condition=20/median_iterations/fixed/0.001",
            "stalled": "rows/condition=20/stalled_fixed_runs/0.001",
            "spread": "rows/*/spread_of_final_objectives",
        },
        "MAID on least squares: from accuracies and first steps over four decades it ends within "
        "{100 * max(map(max, spread)):.1f} % of one objective. At condition 20 it needs "
        "{min(ours):,.0f} to {max(ours):,.0f} lower iterations in the median, more than a fixed "
        "accuracy of 1e-3 ({fixed:,.0f}), of which {stalled} runs of 5 stall further on.",
    ),
    Sentence(
        BENCHMARKS,
        "bo_rep_text",
        {"order": "tasks/penalty/order_by_validation_loss"},
        "On the penalty of short texts SABA is number {order.index('saba') + 1} of {len(order)} "
        "by validation loss, no tuning number {order.index('none') + 1} (missed).",
    ),
    Sentence(
        BENCHMARKS,
        "stn_digits",
        {
            "delta": "verdicts/delta_stn_over_best_fixed",
            "noise": "verdicts/replay_below_noise/ratio",
        },
        "Delta-STN on the dropout of digits: {delta:.2f} of the validation loss of the best of "
        "nine fixed rates. STN's schedule, replayed, has {noise:.2f} times the loss of noise on "
        "the best fixed rate (missed).",
    ),
    Sentence(
        BENCHMARKS,
        "delta_stn",
        {"delta": "rows/*/delta_stn/weights", "stn": "rows/*/stn/weights"},
        "Delta-STN's weights are those at the current hyperparameters to {max(delta) * "
        "1e15:.0f}e-15, STN's are off by {min(stn) * 1e3:.0f}e-3 and more.",
    ),
    Sentence(
        BENCHMARKS,
        "hybrid",
        {
            "penalties": "results/net/hyperparameters",
            "solve": "results/net/nets/gated/curves/minres/error/median",
            "warm": "results/net/nets/gated/curves/warm/error/median",
            "many": "results/pixels/hyperparameters",
            "pixels": "results/pixels/nets/affine/curves/warm/error/median",
        },
        "A hypernetwork corrects a short solve: on a perceptron with {penalties} penalties the "
        "error by 4 products of MINRES falls from {solve[0][3]:.2f} to {solve[3][3]:.2f}, upon a "
        "warm start by one from {warm[0][0]:.3f} to {warm[3][0]:.3f}. With {many} penalties on a "
        "linear model an affine one does harm: from {pixels[0][0]:.3f} to {pixels[3][0]:.3f} by "
        "one upon a warm start.",
    ),
    Sentence(
        BENCHMARKS,
        "response_fidelity",
        {"least": "rows/*/cosine_least_each"},
        "Cosine of a self-tuning network's hypergradient to the exact one, the least along a run "
        "and over five seeds, after the warm-up: ridge with 8 penalties {min(least[0]):.3f} and "
        "{min(least[1]):.3f} (STN and Delta-STN; {min(least[2]):.3f} where STN's raw values do "
        "not start at zero), logistic regression with 9 penalties {min(least[3]):.3f} and "
        "{min(least[4]):.3f}, perceptron {min(least[5]):.2f} and {min(least[6]):.2f}.",
    ),
    Sentence(
        BENCHMARKS,
        "stn_overhead",
        {name: f"results/{name}" for name in ("dense", "conv", "lstm")}
        | {"penalized": "results/dense-l2/gates on outputs, 128/time_ratio"},
        "A self-tuning training step with a draw of hyperparameters per example takes "
        "{dense['gates on outputs, 128']['time_ratio']:.1f} times a plain one on a perceptron, "
        "{conv['gates on outputs, 128']['time_ratio']:.1f} times with convolutions, "
        "{lstm['gates on outputs, 32']['time_ratio']:.1f} times on an LSTM; {penalized:.1f} times "
        "where each layer has an L2 penalty. Weights added up for every draw take "
        "{dense['weights added up, 4']['time_ratio']:.0f} times for 4 draws and "
        "{dense['weights added up, 128']['time_ratio']:.0f} for 128 on the perceptron, with "
        "convolutions {conv['weights added up, 4']['time_ratio']:.1f} and "
        "{conv['weights added up, 128']['time_ratio']:.1f} times.",
    ),
    Sentence(
        BENCHMARKS,
        "mip",
        {
            "mip": "mnist/SGD 0.03/MIP/excess_at_the_end/each",
            "default": "mnist/SGD 0.03/default/excess_at_the_end/each",
        },
        "Magnitude invariance on MNIST by SGD at 0.03: {sum(x != x for x in mip)} of five seeds "
        "diverge with it, {sum(x != x for x in default)} without.",
    ),
    Sentence(
        BENCHMARKS,
        "continual_intervals",
        {
            "middle": "rows/2/final",
            "whole": "rows/2/certified",
            "certificates": "rows/*/attacks/certificates",
            "broken": "rows/*/attacks/broken/*",
            "nested": "rows/5/forgetting",
        },
        "Boxes of embeddings, five tasks: {100 * middle:.1f} % at the middle, {100 * whole:.1f} % "
        "certified for the whole box of size 0.5, and {sum(map(sum, broken))} of "
        "{sum(certificates):,} certificates broken by networks drawn or chosen. Boxes with a "
        "common core forget {nested:.2f} (missed).",
    ),
    Sentence(
        BENCHMARKS,
        "hdet",
        {
            "own": "digits/linear, own 16, sigma 0.002/1e-05",
            "shared": "digits/linear, shared 128, sigma 0.002/1e-05",
            "cost": "cost/every 20/ratio",
        },
        "HDET with a batch of its own per member ends at a loss of {own:.1f} from 1e-5 on digits, "
        "with one for all at {shared:.3f} (linear spread, sigma of 0.002). On a network of 9,500 "
        "parameters a convergence adds {100 * cost - 100:.1f} % to twenty steps.",
    ),
    Sentence(
        BENCHMARKS,
        "population_hypergradient",
        {
            "rows": "ridge/rows",
            "error": "digits/*/combined",
            "secants": "digits/*/secant",
            "first": "digits/*/first_order",
            "tuned": "tuned/combined/loss",
            "plain": "tuned/first_order/loss",
        },
        "Population hypergradient on ridge, two of sixty steps differentiated, noise of 1e-3: "
        "relative error {rows['window 2, noise 0.001']['combined']['mean']:.3f}; secants alone "
        "{rows['window 2, noise 0.001']['secant']['mean']:.3f}, first order {rows['window 2, "
        "noise 0.001']['first_order']['mean']:.3f}. Where the noise hides the bias first order "
        "alone is better: at a noise of 0.01 by {rows['window 4, noise 0.01']['combined']['mean'] "
        "/ rows['window 4, noise 0.01']['first_order']['mean']:.0f} times with four steps "
        "differentiated, by {rows['window 60, noise 0.01']['combined']['mean'] / rows['window 60, "
        "noise 0.01']['first_order']['mean']:.0f} times with all. On digits after 20 to 200 steps "
        "the error is {min(error):.3f} to {max(error):.3f}, of secants {min(secants):.3f} to "
        "{max(secants):.3f}, of first order {min(first):.2f} to {max(first):.2f}; but first order "
        "tunes the same network as well (loss {plain:.3f}, {tuned:.3f} with both).",
    ),
    Sentence(
        BENCHMARKS,
        "hyperband",
        {
            "steps": "halving/compute_ratio",
            "time": "halving/wall_ratio",
            "lost": "halving/loss_lost",
        },
        "Halving on digits takes 1/{steps:.0f} of the steps and 1/{time:.0f} of the time for "
        "{lost:.4f} of loss.",
    ),
    Sentence(
        BENCHMARKS,
        "srm",
        {"alone": "r2/curve_only", "both": "r2/curve_and_traits"},
        "Learning curves alone forecast as well as with hyperparameters beside them: R^2 "
        "{alone:.2f} and {both:.2f}.",
    ),
    Sentence(
        BENCHMARKS,
        "metade",
        {"found": "rows/*/medians/MetaDE", "again": "rows/*/medians/MetaDE, another seed"},
        "From another seed MetaDE's genes are worse than they looked on {sum(a > b for a, b in "
        "zip(again, found))} functions of {len(found)}: that is what a common seed does.",
    ),
    Sentence(
        BENCHMARKS,
        "advisor",
        {
            "near": "tables/rotated/local/geometric_mean/2000",
            "pure": "tables/rotated/pure/geometric_mean/2000",
        },
        "Advice near the optimum of the rotated problem ends {near / pure:.0f} times worse at "
        "2,000 trials than none.",
    ),
    Sentence(
        BENCHMARKS,
        "search_adapters",
        {
            "random": "rows/random/median",
            "tpe": "rows/TPE/median",
            "cma": "rows/CMA-ES/median",
            "evosax": "rows/CMA-ES of evosax/median",
        },
        "Searches over populations of digits: TPE ({tpe:.3f}) and CMA-ES ({cma:.3f}, {evosax:.3f} "
        "of evosax) are below random search ({random:.3f}).",
    ),
    Sentence(
        BENCHMARKS,
        "multiplicity",
        {
            "four": "logistic/components/4/edge share",
            "trained": "logistic/components/2/trained share",
        },
        "Predictive multiplicity: 64 models at the edge of the near-optimal set see {100 * "
        "four:.0f} % of what the convex problem finds in four dimensions; merely trained ones "
        "{100 * trained:.0f} % in two.",
    ),
    Sentence(
        BENCHMARKS,
        "gtep",
        {"mean": "judged_on/*/overestimate/EWC", "spread": "judged_on/*/overestimate/EWC/std"},
        "Tuned on digits, judged on Gaussian classes and on Fashion: over five seeds the "
        "overestimates of EWC are {mean[0] / spread[0] * 5**0.5:.1f} and "
        "{mean[1] / spread[1] * 5**0.5:.1f} standard errors from 0.",
    ),
    Sentence(
        BENCHMARKS,
        "population_layers",
        {
            "conv": "results/conv 3x3/*/patches/gain",
            "depth": "results/depthwise 3x3/*/patches/gain",
            "unit": "results/unit CNN/*/patches, one by one/gain",
            "least": "least_gain",
            "target": "target",
        },
        "Layers under vmap over members with weights of their own, 8 and 32 members: "
        "`hj.layers.conv` {conv[1]:.0f} and {conv[2]:.0f} times XLA's grouped convolution, "
        "{depth[1]:.0f} and {depth[2]:.0f} times depthwise; a whole network of two {unit[1]:.0f} "
        "and {unit[2]:.0f} times. For embedding, attention, GRU, LSTM and layer norm no way "
        "gained {target} at both sizes; the best {max(max(least[k].values()) for k in "
        "('embedding', 'attention', 'gru', 'lstm', 'layer norm')):.2f}.",
    ),
    Sentence(
        BENCHMARKS,
        "population_members",
        {"memory": "memory", "ratio": "ratio"},
        "10,000 members of 1,002 parameters: {memory[0]['argument_bytes'] / 1e6:.0f} MB of states "
        "and as much for a copy, {memory[0]['temporary_bytes'] / 1e6:.1f} to "
        "{memory[4]['temporary_bytes'] / 1e6:.1f} MB of temporaries in chunks of "
        "{memory[0]['chunk']} to {memory[4]['chunk']}; {ratio:.2f} times the throughput of 256 "
        "members.",
    ),
    Sentence(
        BENCHMARKS,
        "population_speed",
        {"of": "targets/*/ratio", "bar": "targets/*/bar"},
        "Replicas x steps per second, perceptron, at 16, 64 and 256 replicas: {of[0]:.2f}, "
        "{of[1]:.2f} and {of[2]:.2f} times a jitted scan ({bar[0]} was to be reached), "
        "{of[3]:.2f}, {of[4]:.2f} and {of[5]:.2f} times vmap in a scan ({bar[3]}, {bar[4]}, "
        "{bar[5]}), {min(of[24], of[29], of[34]):.1f} to {max(of[24], of[29], of[34]):.1f} times "
        "a Python loop, {min(of[27], of[32], of[37]):.0f} to {max(of[27], of[32], of[37]):.0f} "
        "times torch eager, {min(of[28], of[33], of[38]):.1f} to {max(of[28], of[33], "
        "of[38]):.1f} times `torch.func.vmap`; alone {of[15]:.2f} times the scan.",
    ),
    Sentence(
        BENCHMARKS,
        "population_speed",
        {"of": "targets/*/ratio", "bar": "targets/*/bar"},
        "The same at 8 and 32 replicas: transformer {of[10]:.2f} and {of[11]:.2f}, GRU "
        "{of[12]:.2f} and {of[13]:.2f} times the scan ({bar[10]}); convolutions {of[7]:.0f} and "
        "{of[9]:.0f} times naive vmap ({bar[7]:.0f}), but {of[6]:.2f} and {of[8]:.2f} times a "
        "Python loop over native ones ({bar[6]}: missed).",
    ),
    Sentence(
        BENCHMARKS,
        "kernels",
        {
            "copied": "ceilings/bytes_per_s",
            "rows": "results/population",
        },
        "Kernels: no accelerator so far, so no kernel is on; the table is that of XLA on two "
        "cores, where a copy moves {copied / 1e9:.0f} GB/s. With 64 networks of 26,122 parameters "
        "a step of SGD, Adam or AdamW is faster than its arrays could be copied (they partly stay "
        "in the cache; {min(rows[r][s]['xla_share'] for r in ('sgd', 'momentum', 'adam', 'adamw') "
        "for s in ('network float32', 'network bfloat16')):.1f} times the floor's speed or more) "
        "and {min(rows[r][s]['bar_s'] / rows[r][s]['xla_s'] for r in ('sgd', 'momentum', 'adam', "
        "'adamw') for s in ('network float32', 'network bfloat16')):.2f} to "
        "{max(rows[r][s]['bar_s'] / rows[r][s]['xla_s'] for r in ('sgd', 'momentum', 'adam', "
        "'adamw') for s in ('network float32', 'network bfloat16')):.1f} times as fast as optax "
        "under vmap, with clipping {rows['adamw clip']['network float32']['bar_s'] / rows['adamw "
        "clip']['network float32']['xla_s']:.1f} and {rows['adamw clip']['network "
        "bfloat16']['bar_s'] / rows['adamw clip']['network bfloat16']['xla_s']:.1f}: nothing to "
        "gain. With master weights or rounding at random it runs at {rows['adamw "
        "master']['network bfloat16']['xla_share']:.1f} and {rows['adamw stochastic']['network "
        "bfloat16']['xla_share']:.1f} of the floor's speed, with the mean over members at "
        "{rows['adamw converge']['network float32']['xla_share']:.1f}.",
    ),
    Sentence(
        BENCHMARKS,
        "kernels",
        {
            "vectors": "results/vector_update/*/2^22 float32/xla_share",
            "gated": "results/gated_dense/forward",
            "dense": "population_dense/*/xla_share",
        },
        "In the same units: the update of a solver beyond the cache {min(vectors):.2f} to "
        "{max(vectors):.2f} in float32. Gated dense in float32, from the shape `layer` on: "
        "{min(gated[s]['xla_share'] for s in ('layer float32', 'lstm float32', 'batch "
        "float32')):.1f} to {max(gated[s]['xla_share'] for s in ('layer float32', 'lstm float32', "
        "'batch float32')):.2f}, {min(gated[s]['bar_s'] / gated[s]['xla_s'] for s in ('layer "
        "float32', 'lstm float32', 'batch float32')):.2f} to {max(gated[s]['bar_s'] / "
        "gated[s]['xla_s'] for s in ('layer float32', 'lstm float32', 'batch float32')):.1f} "
        "times as fast as one product of twice the width. Population dense is below 0.8 in "
        "{sum(share < 0.8 for share in dense)} shapes of {len(dense)}: on CPU chunks are the "
        "answer, and on an accelerator this row decides whether it gets a kernel.",
    ),
)
