"""The paper's claims by their letters."""

from elit.reproduce.claims_loss import LOSS_CLAIMS
from elit.reproduce.claims_samples import SAMPLE_CLAIMS
from elit.reproduce.evidence import Claim

CLAIMS: dict[str, Claim] = {
    claim.letter: claim
    for claim in sorted([*LOSS_CLAIMS, *SAMPLE_CLAIMS], key=lambda claim: claim.letter)
}
