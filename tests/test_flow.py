"""The flow against closed forms: objective, guidance, samplers."""

import math
from itertools import pairwise

import diffusers
import pytest
import torch
from torch import Tensor

from elit import flow
from elit._devices import wide
from elit.flow.coarse import coarse_noise, coarse_sigma, refine
from elit.flow.guidance import CFG, AutoGuidance, CheapCFG, Guidance
from elit.flow.objective import (
    SigmaDensity,
    flow_matching_loss,
    interpolate,
)
from elit.flow.schedulers import (
    SAMPLERS,
    FlowMatchEulerMaruyamaScheduler,
    FlowMatchUniformEulerScheduler,
    FlowMatchUniformHeunScheduler,
    _trial,
    make_scheduler,
    shift_of,
    start_sampling,
    with_shift,
)
from elit.flow.shift import shift_at, shifted

ODE_SAMPLERS = [sampler for sampler in SAMPLERS if sampler != "euler-maruyama"]
MEAN, STD = 1.5, 0.5  # of the Gaussian data


# ---- objective ----


def test_interpolation_runs_straight_from_data_to_noise() -> None:
    data, noise = torch.randn(2, 4, 3, 8, 8)
    ends = interpolate(data, noise, torch.tensor([0.0, 1.0, 0.25, 1.0]))
    assert torch.equal(ends[0], data[0])
    torch.testing.assert_close(ends[[1, 3]], noise[[1, 3]])
    torch.testing.assert_close(ends[2], 0.75 * data[2] + 0.25 * noise[2])


def test_the_loss_is_the_squared_error_of_each_sample() -> None:
    data, noise = torch.randn(2, 4, 3, 8, 8)
    sigma = torch.rand(4)
    seen = []

    def velocity(x: Tensor, level: Tensor) -> Tensor:
        seen.append((x, level))
        return noise - data + torch.tensor([0.0, 1.0, -2.0, 3.0]).view(4, 1, 1, 1)

    loss = flow_matching_loss(velocity, data, noise, sigma)
    torch.testing.assert_close(loss, torch.tensor([0.0, 1.0, 4.0, 9.0]))
    assert torch.equal(seen[0][0], interpolate(data, noise, sigma))
    assert torch.equal(seen[0][1], sigma)
    half = flow_matching_loss(lambda x, s: velocity(x, s).bfloat16(), data, noise, sigma)
    assert half.dtype == torch.float32


def test_the_optimal_velocity_has_the_least_loss() -> None:
    """Of Gaussian data: the expectation of noise - data, given the point between them."""
    noise, data = torch.randn(2, 20_000, 4)
    data = MEAN + STD * data
    sigma = torch.full((20_000,), 0.6)
    losses = {
        bend: flow_matching_loss(
            lambda x, s, bend=bend: gaussian_velocity(x, s[:, None]) + bend * x, data, noise, sigma
        ).mean()
        for bend in (-0.1, 0.0, 0.1)
    }
    assert min(losses, key=losses.get) == 0.0
    # Var(noise - data | x): what no model can predict.
    variance = STD**2 / (0.4**2 * STD**2 + 0.6**2)
    torch.testing.assert_close(losses[0.0], torch.tensor(variance), rtol=0.02, atol=0)


def logit_normal(mean: float, std: float):
    normal = torch.distributions.Normal(mean, std)
    return SigmaDensity("logit_normal", mean, std), lambda p: torch.sigmoid(normal.icdf(p))


@pytest.mark.parametrize(
    ("density", "quantile"),
    [logit_normal(0.0, 1.0), logit_normal(-0.5, 0.8), (SigmaDensity("uniform"), lambda p: p)],
)
def test_densities(density: SigmaDensity, quantile) -> None:
    before, p = torch.get_rng_state(), torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    sigma, again = (density.sample(40_000, torch.Generator().manual_seed(0)) for _ in range(2))
    torch.testing.assert_close(sigma.quantile(p), quantile(p), atol=0.01, rtol=0)
    assert sigma.shape == (40_000,)
    assert torch.equal(sigma, again)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (SigmaDensity, ("cosine",), "density 'cosine' is unknown; use 'logit_normal' or 'uniform'"),
        (SigmaDensity, ("logit_normal", 0.0, 0.0), r"std 0\.0 is not allowed; .* std is positive"),
        (SigmaDensity, ("logit_normal", 0.0, -1.0), r"std -1\.0"),
        (SigmaDensity, ("logit_normal", 0.0, math.nan), "std nan"),
        (SigmaDensity, ("logit_normal", math.inf), "mean inf"),
        (SigmaDensity, ("uniform", -0.5, 0.8), "have no effect on a uniform density"),
        (AutoGuidance, (3.0, "low"), r"guide budget 'low' .*'lowest'"),
        (CheapCFG, (3.0, "low"), r"guide budget 'low' .*'lowest'"),
        (Guidance, (3.0, False, None), "drop_label"),
        (Guidance, (3.0, "yes", None), "drop_label='yes' is not allowed"),
        (CFG, (-1.0,), r"guidance scale -1\.0 is not allowed; use 1 for none"),
        (CFG, (math.nan,), "guidance scale nan"),
        (CFG, (math.inf,), "guidance scale inf"),
        (CFG, ("3",), "guidance scale '3' is not allowed"),
        (CFG, (2, 0.5), "guidance interval 0.5 is not allowed"),
        (CFG, (2, (0, 0.5, 1)), "interval"),
        (CFG, (2, (0.7, 0.3)), r"interval \(0\.7, 0\.3\).* 0 <= low <= high <= 1"),
        (CFG, (2, (-0.1, 0.3)), "interval"),
        (CFG, (2, (0.1, 1.3)), "interval"),
        (CFG, (2, (0.1, math.nan)), "interval"),
        (
            SigmaDensity,
            ("uniform", 0.0, 1.0, 0.0),
            r"shift 0\.0 is not allowed; give a number from",
        ),
        (make_scheduler, ("euler", "dim"), r"shift 'dim' .*'dimension' for sqrt\(m / 4096\)"),
        (shift_at, ("dimension", None), "needs the numbers of a sample: give dimension"),
        (
            with_shift,
            (diffusers.DDIMScheduler(), 2.0),
            "a DDIMScheduler takes no shift; use make_s",
        ),
        (make_scheduler, ("ddim",), "unknown sampler 'ddim': use one of 'euler', 'heun', "),
    ],
)
def test_what_is_refused(make, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(*arguments)


# ---- guidance ----

NULL = 10


class Predictor:
    """A "model" whose velocity tells its label and budget; notes its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], int | None]] = []

    def __call__(self, x: Tensor, sigma: float, condition: dict, num_latents: int | None) -> Tensor:
        labels = condition["class_labels"]
        self.calls.append((labels.tolist(), num_latents))
        value = torch.where(labels == NULL, -1.0, labels + 1.0) * (num_latents or 1) + sigma
        return x * value.view(-1, 1)


def guided(guidance: Guidance, sigma: float, latents: int | None, guide: int | None) -> tuple:
    predict, labels = Predictor(), {"class_labels": torch.tensor([0, 3])}
    null = {"class_labels": torch.full((2,), NULL)}
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    velocity = guidance.velocity(predict, x, sigma, labels, null, latents, guide)
    plain = Predictor()(x, sigma, labels, latents)
    assert velocity.dtype == torch.float32
    return velocity, plain, predict.calls, x


@pytest.mark.parametrize("make", [CFG, AutoGuidance, CheapCFG])
def test_scale_one_is_no_guidance(make) -> None:
    velocity, plain, calls, _ = guided(make(1.0), 0.5, 16, 1)
    assert torch.equal(velocity, plain)
    assert calls == [([0, 3], 16)]  # and costs nothing


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0])
@pytest.mark.parametrize(
    ("make", "guide_latents", "factors", "expected"),
    [
        (CFG, 16, (-15.5, -15.5), [([0, 3, NULL, NULL], 16)]),  # one doubled batch
        (AutoGuidance, 2, (2.5, 8.5), [([0, 3], 16), ([0, 3], 2)]),
        (CheapCFG, 2, (-1.5, -1.5), [([0, 3], 16), ([NULL, NULL], 2)]),
    ],
)
def test_guidance_extrapolates_from_its_guide(
    make, guide_latents, factors, expected, scale
) -> None:
    velocity, plain, calls, x = guided(make(scale), 0.5, 16, guide_latents)
    guide = x * torch.tensor(factors)[:, None]
    torch.testing.assert_close(velocity, guide + scale * (plain - guide))
    assert calls == expected
    forwards = make(scale).forwards(0.5, 16, guide_latents)
    assert list(forwards) == [(latents, len(labels) // 2) for labels, latents in expected]


def test_autoguidance_at_the_predictions_budget_is_no_guidance() -> None:
    velocity, plain, calls, _ = guided(AutoGuidance(3.0), 0.5, 2, 2)
    assert torch.equal(velocity, plain)
    assert calls == [([0, 3], 2)]


@pytest.mark.parametrize("guide_latents", [16, 1])
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_velocities_are_at_least_float32(dtype: torch.dtype, scale: float, guide_latents) -> None:
    def predict(x: Tensor, sigma: float, condition: dict, num_latents: int | None) -> Tensor:
        return (torch.ones_like(x) / 3).to(dtype)

    labels = {"class_labels": torch.zeros(2, dtype=torch.long)}
    x = torch.zeros(2, 1, dtype=torch.float64)
    velocity = CFG(scale).velocity(predict, x, 0.5, labels, labels, 16, guide_latents)
    assert velocity.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    third = torch.tensor(1 / 3, dtype=torch.float64).to(dtype).to(velocity.dtype)
    torch.testing.assert_close(velocity, third.expand(2, 1), rtol=1e-15, atol=0)


@pytest.mark.parametrize("make", [CFG, AutoGuidance, CheapCFG])
def test_the_interval_holds_both_ends(make) -> None:
    guidance = make(3.0, interval=(0.25, 0.75))
    active = [s for s in (0.0, 0.2, 0.25, 0.5, 0.75, 0.8, 1.0) if guidance.is_active(s)]
    assert active == [0.25, 0.5, 0.75]
    for sigma, inside in ((0.75, True), (0.8, False)):
        velocity, plain, _, _ = guided(guidance, sigma, 16, 1)
        assert torch.equal(velocity, plain) == (not inside)
    everywhere = make(3.0)
    assert everywhere.is_active(0.0)
    assert everywhere.is_active(1.0)


@pytest.mark.parametrize("step", range(11))
def test_the_interval_holds_its_ends_in_a_schedulers_float32(step: int) -> None:
    levels = [*start_sampling(make_scheduler("euler"), 10, "cpu"), 0.0]
    assert CFG(3.0, interval=(0.0, 1 - step / 10)).is_active(levels[step])
    assert CFG(3.0, interval=(round(1 - step / 10, 1), 1.0)).is_active(levels[step])
    if step:
        assert not CFG(3.0, interval=(0.0, 1 - step / 10)).is_active(levels[step - 1])


# ---- samplers ----


def gaussian_velocity(x: Tensor, sigma: Tensor | float) -> Tensor:
    """E[noise - data | x] of N(MEAN, STD^2) data: the best that any model can predict."""
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    gain = (sigma - (1 - sigma) * STD**2) / variance
    return gain * (x - (1 - sigma) * MEAN) - MEAN


def sample(sampler, velocity, x: Tensor, steps: int, generator=None, sigmas=None) -> Tensor:
    """Runs a sampler, by its name or itself."""
    scheduler = make_scheduler(sampler) if isinstance(sampler, str) else sampler
    start_sampling(scheduler, steps, "cpu", sigmas)
    return flow.sample(lambda x, sigma, *_: velocity(x, sigma), x, scheduler, generator=generator)


def test_the_sampler_calls_what_predicts_with_what_it_was_given() -> None:
    scheduler, seen, after = make_scheduler("heun"), [], []
    levels = start_sampling(scheduler, 2, "cpu")
    label, null, kept = torch.tensor([1, 2]), torch.tensor([9, 9]), [(8, 8), (4, 2), (16, 2)]

    def predict(x: Tensor, sigma: float, condition, num_latents: int) -> Tensor:
        assert not torch.is_grad_enabled()
        seen.append((sigma, condition["label"].tolist(), num_latents))
        return torch.zeros_like(x, dtype=torch.float64)

    def note(step: int, timestep: Tensor, x: Tensor) -> Tensor:
        after.append((step, timestep.item(), x.dtype))
        return x + 1

    guidance = Guidance(2.0, drop_label=True, budget=0.5)
    given = {"label": label}, {"label": null}
    x = flow.sample(predict, torch.zeros(2, 3), scheduler, guidance, kept, *given, after_step=note)
    assert levels == [1.0, 0.5, 0.5]
    assert seen == [
        (1.0, [1, 2, 9, 9], 8), (0.5, [1, 2], 4), (0.5, [9, 9], 2), (0.5, [1, 2], 16),
        (0.5, [9, 9], 2),
    ]  # fmt: skip
    assert after == [(i, t, torch.float32) for i, t in enumerate((1000.0, 500.0, 500.0))]
    assert torch.equal(x, torch.full((2, 3), 2.0))  # Heun's correction starts from the noise
    with pytest.raises(ValueError, match="2 pairs in latents_of_steps for 3 calls of the model"):
        flow.sample(predict, x, scheduler, guidance, kept[:2], *given)
    with pytest.raises(ValueError, match=r"null_condition lacks label, by which .*; give the same"):
        flow.sample(predict, x, scheduler, guidance, kept, {"label": label})


def flow_of_cubic(x: Tensor, sigma: float) -> Tensor:
    """d/dsigma of sigma^3."""
    return torch.full_like(x, 3 * sigma**2)


@pytest.mark.parametrize(
    ("sampler", "steps", "error"),
    [("euler", 200, 0.01), ("heun", 40, 0.002), ("unipc", 40, 0.005), ("dpm-solver", 100, 0.01)],
)
def test_every_ode_sampler_integrates_a_velocity_of_time(sampler, steps, error: float) -> None:
    """From sigma 1 to 0, 3 sigma^2 takes away 1."""
    x = torch.tensor([[2.0, -1.0]])
    out = sample(sampler, flow_of_cubic, x, steps)
    torch.testing.assert_close(out, x - 1, atol=error, rtol=0)


def test_euler_and_heun_are_the_rectangle_and_trapezoid_rules() -> None:
    """Exactly: the closed forms of the sums of 3 sigma^2 over a uniform grid."""
    n, x = 10, torch.zeros(1, 1, dtype=torch.float32)
    squares = (n + 1) * (2 * n + 1) / (2 * n**2)  # 3/n sum (i/n)^2, i = 1..n
    torch.testing.assert_close(sample("euler", flow_of_cubic, x, n), x - squares)
    # The last step, of length 1/n, is Euler's: it lacks half of 3/n (0^2 - (1/n)^2).
    trapezoid = squares - 3 / (2 * n) + 3 / (2 * n**3)
    torch.testing.assert_close(sample("heun", flow_of_cubic, x, n), x - trapezoid)


# Not Euler-Maruyama: its last step, without noise, still follows the drift of the SDE.
@pytest.mark.parametrize("sampler", ODE_SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_ode_sampler_lands_on_a_single_image(sampler: str, steps: int) -> None:
    """All data in one point: the paths are straight, and any number of steps is exact."""
    point = torch.tensor([[0.3, -0.8]])
    x = torch.randn(5, 2)
    # UniPC and DPM-Solver begin at sigma 0.999, where a sample of pure noise is off the path.
    out = sample(sampler, lambda x, s: (x - point) / s, x, steps)
    torch.testing.assert_close(out, point.expand(5, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("sampler", "error"), [("euler", 0.06), ("heun", 0.003), ("unipc", 0.006), ("dpm-solver", 0.02)]
)
def test_every_ode_sampler_turns_noise_into_gaussian_data(sampler: str, error: float) -> None:
    """The exact solution is MEAN + STD x."""
    x = torch.linspace(-3, 3, 13)[:, None]
    out = sample(sampler, gaussian_velocity, x, 40)
    torch.testing.assert_close(out, MEAN + STD * x, atol=error, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.4])
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_convergence(sampler: str, order: int, shift: float) -> None:
    x = torch.linspace(-3, 3, 13)[:, None]
    exact = MEAN + STD * x
    errors = [
        (sample(make_scheduler(sampler, shift), gaussian_velocity, x, n) - exact).norm()
        for n in (10, 20, 40, 80)
    ]
    orders = [math.log2(before / after) for before, after in pairwise(errors)]
    assert orders[-1] == pytest.approx(order, abs=0.15)


def test_own_heun_is_diffusers_heun_on_the_same_levels() -> None:
    theirs = diffusers.FlowMatchHeunDiscreteScheduler()
    x = torch.linspace(-3, 3, 13)[:, None]
    levels = start_sampling(theirs, 10, "cpu")
    expected = sample(theirs, gaussian_velocity, x, 10)
    grid = [levels[0], *levels[1::2]]
    ours = sample(FlowMatchUniformHeunScheduler(), gaussian_velocity, x, 10, sigmas=grid)
    torch.testing.assert_close(ours, expected)


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
FLUX = {"shift": 3.0, "use_dynamic_shifting": True}
LTX = {
    "use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05,
    "base_image_seq_len": 1024, "shift_terminal": 0.1,
}  # fmt: skip


def of_diffusers(name: str, settings: dict):
    return getattr(diffusers, name)(**settings)


@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"num_train_timesteps": 500}),
        ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True}),
        ("FlowMatchEulerDiscreteScheduler", FLUX),
        ("FlowMatchEulerDiscreteScheduler", FLUX | {"time_shift_type": "linear"}),
        ("FlowMatchEulerDiscreteScheduler", LTX),
        ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
        ("UniPCMultistepScheduler", FLOW),
        ("UniPCMultistepScheduler", FLOW | {"solver_order": 3, "flow_shift": 3.0}),
        ("UniPCMultistepScheduler", FLOW | {"use_dynamic_shifting": True, "shift_terminal": 0.1}),
        ("DPMSolverMultistepScheduler", FLOW | {"algorithm_type": "sde-dpmsolver++"}),
        ("DPMSolverMultistepScheduler", FLOW | {"use_dynamic_shifting": True}),
        ("DPMSolverSinglestepScheduler", FLOW | {"solver_order": 3}),
    ],
)
def test_schedulers_of_diffusers_turn_noise_into_data(name: str, settings: dict, steps) -> None:
    """Data in a point are reached by any method; a deviation within what Euler's steps lose."""
    scheduler = of_diffusers(name, settings)
    x = torch.randn(1, 1, 20_000, 1)
    at_point, spread, factor = x, x, 1.0
    for model in range(2):
        levels = start_sampling(scheduler, steps, "cpu", num_tokens=1024)
        extra = {"generator": torch.Generator().manual_seed(0)} if "sde" in str(settings) else {}
        for sigma, timestep in zip(levels, scheduler.timesteps, strict=True):
            if model == 0:
                velocity = (at_point - MEAN) / sigma
                at_point = scheduler.step(velocity, timestep, at_point, **extra).prev_sample
            else:
                velocity = gaussian_velocity(spread, sigma)
                spread = scheduler.step(velocity, timestep, spread, **extra).prev_sample
    for sigma, after in pairwise([*levels, 0.0]):  # Euler's method multiplies the deviation
        variance = (1 - sigma) ** 2 * STD**2 + sigma**2
        factor *= 1 + (after - sigma) * (sigma - (1 - sigma) * STD**2) / variance
    torch.testing.assert_close(at_point, torch.full_like(x, MEAN), atol=1e-3, rtol=0)
    assert spread.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert spread.std().item() == pytest.approx(STD, abs=1.1 * abs(factor - STD) + 0.02)


@pytest.mark.parametrize("steps", [1, 8, 20])
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("DEISMultistepScheduler", FLOW),
        ("SASolverScheduler", FLOW),
        ("DPMSolverMultistepInverseScheduler", FLOW),
        ("FlowMatchLCMScheduler", {}),  # jumps to the mean of the data and draws new noise
        ("HeliosScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True}),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}),  # predicts "epsilon"
        ("UniPCMultistepScheduler", FLOW | {"prediction_type": "v_prediction"}),
        ("UniPCMultistepScheduler", FLOW | {"use_exponential_sigmas": True}),
        ("DPMSolverMultistepScheduler", FLOW | {"prediction_type": "sample"}),
        ("DPMSolverMultistepScheduler", FLOW | {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", FLOW | {"use_lu_lambdas": True}),
        ("DPMSolverMultistepScheduler", FLOW | {"final_sigmas_type": "sigma_min"}),
        ("DPMSolverMultistepScheduler", FLOW | {"thresholding": True}),
    ],
)
def test_schedulers_that_would_leave_noise_are_refused(name: str, settings, steps: int) -> None:
    message = rf"{name}.* (is off by|fails) .*; use make_scheduler with one of euler, "
    with pytest.raises(ValueError, match=message):
        start_sampling(of_diffusers(name, settings), steps, "cpu")


def test_the_flow_that_schedulers_are_tried_on_is_solved_by_many_steps() -> None:
    error, allowed = _trial(make_scheduler("euler"), 300, None)
    assert 0 < error < 0.003
    assert allowed == pytest.approx(0.03 + 1.2 * error, abs=1e-5)


def test_levels_shift_with_the_number_of_tokens_as_in_diffusers_pipelines() -> None:
    flux, ltx = (of_diffusers("FlowMatchEulerDiscreteScheduler", one) for one in (FLUX, LTX))
    for tokens, mu in ((256, 0.5), (1024, 0.63), (4096, 1.15)):
        shifted = [math.exp(mu) / (math.exp(mu) + 1 / s - 1) for s in (1, 0.75, 0.5, 0.25)]
        assert start_sampling(flux, 4, "cpu", num_tokens=tokens) == pytest.approx(shifted, abs=1e-3)
    assert start_sampling(ltx, 1, "cpu", num_tokens=1024) == [1.0]
    levels = start_sampling(ltx, 5, "cpu", num_tokens=1024)
    assert levels[0] == 1
    assert levels[-1] == pytest.approx(0.1)
    assert ltx.config.shift_terminal == 0.1
    with pytest.raises(ValueError, match="by the number of tokens: give num_tokens"):
        start_sampling(flux, 4, "cpu")


# ---- shift ----


def test_the_shift_of_levels() -> None:
    assert shifted(0.5, 3.0) == pytest.approx(0.75)
    assert [shifted(end, 0.1) for end in (0.0, 1.0)] == [0, 1]
    assert shifted(shifted(0.3, 4.0), 0.25) == pytest.approx(0.3)
    assert shift_at("dimension", 196_608) == pytest.approx(48**0.5)  # RAE's, and SD3's rule: by
    assert shift_at("dimension", 4 * 4096) == 2 * shift_at("dimension", 4096) == 2  # the side


def test_a_shifted_logit_normal_density_is_one_of_another_mean() -> None:
    plain, by_mean, by_size = (
        SigmaDensity("logit_normal", *mean, shift=shift)
        for mean, shift in (((), 3.0), ((math.log(3),), 1.0), ((), "dimension"))
    )
    levels = [
        density.sample(1000, torch.Generator().manual_seed(0), (4, 96, 96))
        for density in (plain, by_mean, by_size)
    ]
    torch.testing.assert_close(levels[0], levels[1])
    assert torch.equal(levels[0], levels[2])  # 9 times 4096
    assert torch.equal(levels[0], plain.sample(1000, torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match=r"'dimension' needs the numbers of a sample"):
        by_size.sample(1000, torch.Generator())
    levels = torch.rand(3)
    assert SigmaDensity().shifted(levels, (4, 96, 96)) is levels


@pytest.mark.parametrize("shift", [3.0, 0.4, "dimension"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_shifts_its_levels_once(sampler: str, shift, tmp_path) -> None:
    scheduler = make_scheduler(sampler, shift)
    assert shift_of(scheduler) == shift
    scheduler.save_pretrained(tmp_path)
    loaded = type(scheduler).from_pretrained(tmp_path)
    assert shift_of(loaded) == shift
    again = make_scheduler("heun", shift_of(loaded))
    for size in (4096, 36_864):
        plain = start_sampling(make_scheduler(sampler), 6, "cpu")
        s = {4096: 1.0, 36_864: 3.0}[size] if shift == "dimension" else shift
        for one in (scheduler, loaded, type(scheduler).from_config(loaded.config)):
            levels = start_sampling(one, 6, "cpu", dimension=size)
            assert levels == pytest.approx([shifted(level, s) for level in plain], abs=2e-3)
        levels = start_sampling(again, 2, "cpu", dimension=size)
        assert levels == pytest.approx([1, shifted(0.5, s), shifted(0.5, s)])
        levels = start_sampling(with_shift(scheduler, 1.0), 6, "cpu", dimension=size)
        assert levels == pytest.approx(plain, abs=1e-6)
    if sampler != "dpm-solver":
        levels = start_sampling(scheduler, 2, "cpu", [1.0, 0.5], dimension=36_864)
        assert levels[-1] == pytest.approx(shifted(0.5, s))


def test_a_scheduler_without_shift_is_as_before_there_was_one() -> None:
    assert not {"shift", "use_dynamic_shifting"} & make_scheduler("heun").config.keys()
    with pytest.raises(ValueError, match="give dimension"):
        start_sampling(make_scheduler("euler", "dimension"), 4, "cpu", num_tokens=16)
    with pytest.raises(ValueError, match="give mu"):
        make_scheduler("heun", "dimension").set_timesteps(4)


def sde_moments(steps: int, last: float = 0.04) -> tuple[float, float]:
    """Mean and variance after Euler-Maruyama, from the reverse SDE written with the score.

    dx = (v - sigma score) dsigma + sqrt(2 sigma) dw, from sigma 1 to `last`; then a step of the
    drift alone, to 0. A step is affine in x, so two points tell its gain.
    """
    mean, variance = 0.0, 1.0
    levels = [*torch.linspace(1, last, steps).double().tolist(), 0.0]
    for sigma, sigma_next in pairwise(levels):

        def step(x: float, s: float = sigma, length: float = sigma - sigma_next) -> float:
            x = torch.tensor(x, dtype=torch.float64)
            marginal = (1 - s) ** 2 * STD**2 + s**2
            score = -(x - (1 - s) * MEAN) / marginal
            return (x - length * (gaussian_velocity(x, s) - s * score)).item()

        gain = step(1.0) - step(0.0)
        noise = 2 * sigma * (sigma - sigma_next) if sigma_next else 0.0
        mean, variance = step(mean), gain**2 * variance + noise
    return mean, variance


@pytest.mark.parametrize("steps", [10, 100])
def test_euler_maruyama_has_the_mean_and_variance_of_its_sde(steps: int) -> None:
    count = 100_000
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 1, generator=generator)
    out = sample("euler-maruyama", gaussian_velocity, x, steps, generator).double()
    mean, variance = sde_moments(steps)
    assert out.mean().item() == pytest.approx(mean, abs=5 * math.sqrt(variance / count))
    assert out.var().item() == pytest.approx(variance, rel=5 * math.sqrt(2 / count))


def test_euler_maruyama_draws_one_noise_for_each_generator() -> None:
    x = torch.randn(3, 2)

    def run(x: Tensor, *seeds: int) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return sample("euler-maruyama", gaussian_velocity, x, 5, generators)

    together = run(x, 1, 2, 3)
    torch.testing.assert_close(run(x[1:], 2, 3), together[1:])
    assert not torch.allclose(run(x, 1, 2, 4)[2], together[2])
    single = FlowMatchEulerMaruyamaScheduler(last_sigma=0.2)
    assert start_sampling(single, 5, "cpu") == pytest.approx([1, 0.8, 0.6, 0.4, 0.2])


@pytest.mark.parametrize("several", [False, True])
def test_a_seed_is_one_path_of_euler_maruyama_in_float32_and_float64(several: bool) -> None:
    x = torch.randn(3, 16)  # torch draws fewer than 16 numbers alike in both types anyway

    def run(dtype: torch.dtype) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        given = generators if several else generators[0]
        return sample("euler-maruyama", gaussian_velocity, x.to(dtype), 20, given)

    single, double = run(torch.float32), run(torch.float64)
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-5)


def test_wide_numbers_are_never_on_a_device_without_them() -> None:
    assert wide(torch.device("mps")) == {"device": torch.device("cpu"), "dtype": torch.float64}
    for name in ("cpu", "cuda:1", "meta"):
        assert wide(torch.device(name)) == {"device": torch.device(name), "dtype": torch.float64}


# ---- a start on a coarser grid ----


@pytest.mark.parametrize("factor", [2, 4])
def test_a_refined_sample_has_the_fine_grids_noise_level(factor: int) -> None:
    """Of data that are linear in place, which bilinear upsampling keeps but at the borders."""
    places = torch.arange(32.0)
    data = (0.1 * places - 0.2 * places[:, None] + 0.5).expand(256, 3, 32, 32)
    coarse_data = torch.nn.functional.avg_pool2d(data, factor)
    sigma = 0.6
    seen, fresh = torch.randn(2, *data.shape)
    samples = interpolate(
        coarse_data, coarse_noise(seen, factor), torch.full((256,), coarse_sigma(sigma, factor))
    )
    fine = refine(samples, coarse_data, sigma, fresh)
    noise = ((fine - (1 - sigma) * data) / sigma)[..., factor:-factor, factor:-factor]
    for shift in range(factor + 1):  # within a cell and across
        product = (noise[..., shift:] * noise[..., : noise.shape[-1] - shift]).mean()
        assert product.item() == pytest.approx(float(shift == 0), abs=0.01)
    # The same noise again: what the coarse one left out of it is all that is put in.
    again = refine(samples, coarse_data, sigma, seen)[..., factor:-factor, factor:-factor]
    expected = interpolate(data, seen, torch.full((256,), sigma))
    torch.testing.assert_close(again, expected[..., factor:-factor, factor:-factor])


@pytest.mark.parametrize("switch", [1, 60, 150])
def test_a_coarse_start_ends_where_the_fine_grid_alone_does(switch: int) -> None:
    """Pictures of one Gaussian colour: their flow takes the noise's mean to a known colour."""

    def velocity(x: Tensor, sigma: float, *_: object) -> Tensor:
        pixels = x[0, 0].numel()
        keep = (1 - sigma) * STD**2 / ((1 - sigma) ** 2 * STD**2 + sigma**2 / pixels)
        colour = MEAN + keep * (x.mean((1, 2, 3, 4), keepdim=True) - (1 - sigma) * MEAN)
        return (x - colour) / sigma

    noise = torch.randn(8, 1, 2, 8, 8)  # clips: their frames keep their number
    levels = [1 - i / 200 for i in range(200)]
    x, coarse = coarse_noise(noise), [coarse_sigma(level) for level in levels[: switch + 1]]
    for sigma, after in pairwise(coarse):
        x = x + (after - sigma) * velocity(x, sigma)
    clean = x - coarse[-1] * velocity(x, coarse[-1])
    x = refine(x, clean, levels[switch], noise)
    end = sample("euler", velocity, x, 1, sigmas=levels[switch:])
    colour = MEAN + STD * 128**0.5 * noise.mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(end, colour.expand_as(end), atol=0.02, rtol=0)


def test_samples_are_refined_by_a_whole_factor() -> None:
    with pytest.raises(ValueError, match=r"samples of .4, 6. cannot be refined to noise of .8, 8."):
        refine(torch.zeros(1, 1, 4, 6), torch.zeros(1, 1, 4, 6), 0.5, torch.zeros(1, 1, 8, 8))


# ---- levels ----


@pytest.mark.parametrize("sampler", ["heun", "euler-maruyama"])
def test_given_levels_are_not_rounded_to_float32(sampler: str) -> None:
    """A constant velocity of 1 goes down by the first level, to the last digit."""
    assert start_sampling(make_scheduler(sampler), 1, "cpu", sigmas=[0.9, 0.3])[0] == 0.9
    if sampler == "heun":
        x = torch.zeros(1, dtype=torch.float64)
        out = sample(sampler, lambda x, s: torch.ones_like(x), x, 2, sigmas=[0.9, 0.3])
        assert out.item() == pytest.approx(-0.9, rel=0, abs=1e-15)


def test_noise_levels_of_each_sampler() -> None:
    """One for each call of the model, read from `sigmas`: `timesteps` may be rounded."""
    quarters = [1, 0.75, 0.5, 0.25]
    assert start_sampling(make_scheduler("euler"), 4, "cpu") == pytest.approx(quarters)
    twice = [1, 0.75, 0.75, 0.5, 0.5, 0.25, 0.25]  # 2N - 1 calls
    assert start_sampling(make_scheduler("heun"), 4, "cpu") == twice
    shifted = start_sampling(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), 4, "cpu")
    assert shifted == pytest.approx([3 * s / (1 + 2 * s) for s in quarters])
    thirds = [1, 0.68, 0.36, 0.04]
    assert start_sampling(make_scheduler("euler-maruyama"), 4, "cpu") == pytest.approx(thirds)
    for sampler in ("unipc", "dpm-solver"):
        levels = start_sampling(make_scheduler(sampler), 4, "cpu")
        assert levels == pytest.approx(quarters, abs=2e-3)  # they begin at 0.999


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_levels_fall_and_end_at_zero(sampler: str, steps: int) -> None:
    scheduler = make_scheduler(sampler)
    levels = start_sampling(scheduler, steps, "cpu")
    assert (
        len(levels) == len(scheduler.timesteps) == (2 * steps - 1 if sampler == "heun" else steps)
    )
    assert scheduler.sigmas[len(levels)] == 0
    assert all(a >= b > 0 for a, b in pairwise(levels))
    torch.testing.assert_close(
        scheduler.timesteps.float() / 1000, torch.tensor(levels), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        (FlowMatchUniformEulerScheduler, {}),
        (FlowMatchUniformHeunScheduler, {}),
        (FlowMatchEulerMaruyamaScheduler, {"last_sigma": 0.1, "path": "cosine"}),
    ],
)
def test_own_schedulers_save_and_load(kind: type, own: dict, tmp_path) -> None:
    scheduler = kind(**own)
    scheduler.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert loaded.config.num_train_timesteps == 1000
    assert {name: getattr(loaded, name) for name in own} == own
    assert start_sampling(loaded, 4, "cpu") == start_sampling(scheduler, 4, "cpu")
    step = torch.ones(1, 1), scheduler.timesteps[0], torch.zeros(1, 1)
    assert loaded.step(*step).prev_sample.isfinite().all()
    assert isinstance(scheduler.step(*step, return_dict=False), tuple)


BAD_STEPS = [
    (steps, None, f"num_inference_steps {steps} .*; 40 is usual") for steps in (0, -3, 2.5, 10**7)
]
BAD_LEVELS = [
    (3, sigmas, r"sigmas .* must fall")
    for sigmas in ([], [0.5, 1.0], [1.0, 0.5, 0.5], [1.2, 0.5], [0.5, -0.1])
]


@pytest.mark.parametrize(("steps", "sigmas", "message"), BAD_STEPS + BAD_LEVELS)
def test_bad_steps_and_levels(steps: float, sigmas: list | None, message: str) -> None:
    for sampler in SAMPLERS:
        with pytest.raises(ValueError, match=message):
            start_sampling(make_scheduler(sampler), steps, "cpu", sigmas)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (make_scheduler("dpm-solver"), "DPMSolverMultistepScheduler takes no sigmas"),
        (diffusers.DDIMScheduler(), "DDIMScheduler is not a flow-matching scheduler"),
    ],
)
def test_schedulers_that_cannot_do_what_is_asked(scheduler, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start_sampling(scheduler, 2, "cpu", sigmas=[1.0, 0.5])


@pytest.mark.parametrize(("size", "factor"), [((7, 8), 2), ((8, 8), 3), ((8, 8), 0), ((8, 8), 1.5)])
def test_a_grid_that_has_no_coarser_one_is_refused(size, factor) -> None:
    with pytest.raises(ValueError, match="whole number that divides both sizes"):
        coarse_noise(torch.zeros(1, 1, *size), factor)
