"""The paper's claims by their letters."""

from elit.reproduce.claims_flops import FLOPS_CLAIMS
from elit.reproduce.claims_latents import LATENT_CLAIMS
from elit.reproduce.claims_samples import SAMPLE_CLAIMS
from elit.reproduce.evidence import Claim

CLAIMS: dict[str, Claim] = {
    claim.letter: claim
    for claim in sorted(
        [*FLOPS_CLAIMS, *LATENT_CLAIMS, *SAMPLE_CLAIMS], key=lambda claim: claim.letter
    )
}
