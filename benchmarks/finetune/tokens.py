"""A task's data in tokens: made once for all processes and seeds, which differ in the order of the examples alone."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path

from finetune.material import hashes
from finetune.profiles import Task
from lorapre.lab.finetune.data import Examples, data_format, load_examples
from lorapre.lab.finetune.packing import pack
from lorapre.lab.finetune.preparation import Data, Plan, load_data
from lorapre.lab.finetune.templates import choose_template
from lorapre.lab.finetune.tokens import Encoded
from lorapre.lab.finetune.trainer import steps_of
from lorapre.lab.run_folder import write_atomically

#: Options of a run that its tokens depend on.
_DECIDING = ("valid_examples", "max_examples", "template", "max_length", "batch_size", "seed")

#: Of `Data`; the rest are functions, which no file can hold.
_KEPT = ("train", "valid", "rows", "steps", "warnings")


def base_data(plan: Plan, material: Path, task: Task) -> Data:
    """`load_data` of ``plan``, from a file beside the material where that is there, else kept there for the next."""
    config = plan.config.model_dump(mode="json")
    facts = {**hashes(material, [*task.files, "model/tokenizer.json"]), **{name: config[name] for name in _DECIDING}}
    facts["chat_template"] = getattr(plan.base.tokenizer, "chat_template", None)
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    path = material / f"tokens-{task.name}-{digest}.pickle"
    if not path.exists():
        data = load_data(plan)
        kept = {name: getattr(data, name) for name in _KEPT}
        content = pickle.dumps((kept, data.examples.train, data.examples.valid, data.examples.description))
        write_atomically(path, lambda temporary: temporary.write_bytes(content))
        return data
    kept, train, valid, description = pickle.loads(path.read_bytes())
    form = data_format(plan.config)
    assert plan.base.tokenizer is not None
    template = choose_template(plan.config, form, plan.base.tokenizer)
    return Data(examples=Examples(train, valid, form, description), template=template, **kept)


def of_seed(plan: Plan, base: Data) -> Data:
    """`load_data` of ``plan``, with the tokens of ``base``, whose plan has another seed and is the same otherwise.

    Where ``--max-examples`` leaves another choice of examples, they are tokenized.
    """
    examples = load_examples(plan.config)
    known = {example.where: row for example, row in zip(base.train.kept, base.train.rows, strict=True)}
    dropped, cut = set(base.train.dropped), set(base.train.cut)
    if not all(example.where in known or example.where in dropped for example in examples.train):
        return load_data(plan)
    kept = [example for example in examples.train if example.where in known]
    train = Encoded(
        [known[example.where] for example in kept],
        kept,
        [example.where for example in examples.train if example.where in cut],
        [example.where for example in examples.train if example.where in dropped],
    )
    config = plan.config
    rows = len(pack(train.dataset(), config.max_length)) if config.packing else len(kept)
    steps = config.steps or steps_of(rows, config.batch_size, config.total_epochs)
    return replace(base, examples=examples, train=train, rows=rows, steps=steps)
