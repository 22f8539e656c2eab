"""One option for each step, so that errors are least within a cap on their costs."""

from collections.abc import Sequence

import numpy as np

Numbers = Sequence[np.ndarray]


def allot(costs: Numbers, errors: Numbers, cap: float) -> list[int]:
    """The option of each step with the least sum of errors whose costs keep within a cap.

    Exact, by dynamic programming over Pareto fronts of (cost, error); of equal errors it is the
    cheapest. States that a Lagrangian bound excludes are dropped, so that fronts stay short.

    Args:
        costs: of the options (O,) of each step.
        errors: likewise.
        cap: on the sum of the costs; at least that of the cheapest options.
    """
    cap = cap * (1 + 1e-12)  # sums are rounded
    least = [float(c.min()) for c in costs]
    if sum(least) > cap:
        raise ValueError(f"the cheapest options cost {sum(least):g}, more than the cap {cap:g}")
    price, best = _price(costs, errors, cap)
    priced = [float((e + price * c).min()) for c, e in zip(costs, errors, strict=True)]
    cost, error, came = np.zeros(1), np.zeros(1), []
    for i, (c, e) in enumerate(zip(costs, errors, strict=True)):
        new_cost, new_error = (cost[:, None] + c).ravel(), (error[:, None] + e).ravel()
        hope = new_error + price * (new_cost - cap) + sum(priced[i + 1 :])  # a bound from below
        within = new_cost + sum(least[i + 1 :]) <= cap
        (kept,) = np.nonzero(within & (hope <= best + 1e-9 * abs(best)))
        kept = kept[np.lexsort((new_error[kept], new_cost[kept]))]
        lowest = np.minimum.accumulate(new_error[kept])
        kept = kept[np.r_[True, lowest[1:] < lowest[:-1]]]
        cost, error = new_cost[kept], new_error[kept]
        came.append(np.divmod(kept, len(c)))  # state before, option
    state, chosen = len(cost) - 1, []
    for before, option in reversed(came):
        chosen.append(int(option[state]))
        state = before[state]
    return chosen[::-1]


def _price(costs: Numbers, errors: Numbers, cap: float) -> tuple[float, float]:
    """A price of cost, in error, at which the best options keep within a cap, and their error."""

    def best_at(price: float) -> tuple[float, float]:
        best = [np.lexsort((c, e + price * c))[0] for c, e in zip(costs, errors, strict=True)]
        return (
            sum(float(c[o]) for c, o in zip(costs, best, strict=True)),
            sum(float(e[o]) for e, o in zip(errors, best, strict=True)),
        )

    cost, error = best_at(0.0)
    if cost <= cap:
        return 0.0, error
    low, high = 0.0, 1.0
    best = sum(float(e[np.lexsort((e, c))[0]]) for c, e in zip(costs, errors, strict=True))
    for _ in range(2000):  # to a price at which cost counts for so much that the cap is kept
        if best_at(high)[0] <= cap:
            break
        low, high = high, 2 * high
    for _ in range(200):
        price = (low + high) / 2
        cost, error = best_at(price)
        if cost <= cap:
            high, best = price, min(best, error)
        else:
            low = price
    return high, best


def exchange(
    chosen: Sequence[int], costs: Numbers, effects: Numbers, gram: np.ndarray, cap: float
) -> list[int]:
    """Change one or two options at a time, within a cap, while it lowers |sum of effects|^2.

    Args:
        chosen: options to start from.
        costs: of the options (O,) of each step.
        effects: of the options (O, D) of each step, in vectors whose products are `gram`.
        gram: (D, D).
        cap: on the sum of the costs.
    """
    sizes = [len(c) for c in costs]
    step = np.repeat(np.arange(len(sizes)), sizes)  # of each option, all steps in a row
    first = np.cumsum([0, *sizes[:-1]])
    cost, effect = np.concatenate(list(costs)), np.concatenate(list(effects))
    products = effect @ gram @ effect.T
    square, cap = products.diagonal(), cap * (1 + 1e-12)
    now = first + np.asarray(chosen)
    while True:
        old = now[step]
        spent, more = cost[now].sum(), cost - cost[old]
        along = products[:, now].sum(1)
        # |u + a|^2 - |u|^2, where a turns the option that is chosen into another one
        one = 2 * (along - along[old]) + square + square[old] - 2 * products[range(len(old)), old]
        mixed = products - products[:, old] - products[old] + products[np.ix_(old, old)]
        two = one[:, None] + one + 2 * mixed
        np.putmask(two, (step[:, None] == step) | (spent + more[:, None] + more > cap), np.inf)
        one = np.where(spent + more > cap, np.inf, one)
        pair = np.unravel_index(int(two.argmin()), two.shape)
        changes = pair if two[pair] < one.min() else (one.argmin(),)
        if not min(two[pair], one.min()) < -1e-6 * abs(products[np.ix_(now, now)].sum()):
            return (now - first).tolist()
        for option in changes:
            now[step[option]] = option
