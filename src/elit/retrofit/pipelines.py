"""Stock pipelines whose transformer was elasticized: folders that load anywhere."""

import inspect
from functools import cache
from typing import Any

from elit._portable import Card, PortablePipeline
from elit.interface.budget import default_budgets, format_budget

PREFIX = "Elastic"  # of the names by which `elit.retrofit.elastic` gives the classes


class ElasticStockPipeline(PortablePipeline):
    """Methods that `elasticize` adds to a pipeline's class, which keeps its name."""

    original_class: type
    load_by = "FOLDER, custom_pipeline=FOLDER, trust_remote_code=True"
    transformer: Any

    @property
    def portable_name(self) -> tuple[str, str]:  # type: ignore[override]
        """Module and name of its class."""
        return type(self.transformer).__module__, f"{PREFIX}{type(self).__name__}"

    def model_card(self) -> Card:
        """What the model card tells."""
        model, kind = self.transformer, type(self).__name__
        settings, most = model.elastic_settings, model.max_latents
        core = settings.depth - settings.head - settings.tail
        kept = [model.resolve_budget(b) for b in default_budgets(model.min_latents, most)]
        is_of_classes = "class_labels" in inspect.signature(type(self).__call__).parameters
        asked = "[0]" if is_of_classes else '"a red fox in the snow"'
        call = f"with pipe.transformer.at_budget(0.5, guide=0.25):\n    output = pipe({asked})"
        return Card(
            title=f"{kind} at any budget",
            about=f"A {kind} whose {model.original_class.__name__} was elasticized by elit: "
            f"{core} of its {settings.depth} blocks run on the latents that a budget keeps, not on "
            f"all tokens. `guide` is the budget of the guidance's other branch. What a call costs "
            f"depends on its size and its prompt: `elit studio .` shows it.",
            table=[
                ["budget", "latents per group", f"tokens in {core} of {settings.depth} blocks"],
                *([format_budget(n / most), str(n), f"{n / most:.0%}"] for n in kept),
            ],
            tags="elastic, elasticized",
            pipeline_tag=None,
            elit=f"import elit.retrofit.elastic  # knows the transformer's class\n"
            f'from diffusers import {kind}\n\npipe = {kind}.from_pretrained(".")\n{call}',
            call=call,
            command="elit studio .",
        )  # fmt: skip


@cache
def elastic_pipeline_class(base: Any) -> Any:
    """The elastic class of a pipeline's class: the same one each time."""
    own = {
        "__module__": __name__,
        "__doc__": f"An elastic {base.__name__}.",
        "original_class": base,
    }
    return type(base.__name__, (ElasticStockPipeline, base), own)
