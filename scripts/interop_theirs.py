"""Dictionaries that the real tools wrote, read here."""

from pathlib import Path

from interop_checks import Part, peer, read_all


def saelens(out: Path) -> Part:
    """All that SAELens writes."""
    version = peer("saelens", "write_saelens.py", out)
    for other in out.glob("finished/*"):  # the way to what a checkpoint means, not a case
        if other.is_file():
            other.unlink()
    refused = {"layer-norm", "abstopk", "matching-pursuit", "transcoder", "jumprelu-transcoder"}
    found = read_all(out, {f"written/{name}" for name in refused})
    text = f"""## SAELens → here

{version}. `written`: `save_model` of random weights; `trained`: `save_inference_model` after thirty
steps of its `SAETrainer`; `checkpoint`: what the same trainer left half-way, compared with what
SAELens would have made of it in the end.

{found.text}"""
    return Part(text, found.ok)


def saelens_before_6(out: Path) -> Part:
    """The layouts of older versions, by their own writers."""
    texts, every = [], True
    for name in ("saelens5", "saelens3"):
        version = peer(name, "write_saelens_old.py", out / name)
        found = read_all(out / name, {"layer-norm", "hook-z"})
        texts.append(f"{version}, random weights, `save_model`:\n\n{found.text}")
        every = every and found.ok
    return Part("## SAELens before version 6 → here\n\n" + "\n\n".join(texts), every)


def sparsify(out: Path) -> Part:
    """All that sparsify writes."""
    version = peer("sparsify", "write_sparsify.py", out)
    refused = {f"{name}/layers.3" for name in ("groupmax", "transcoder", "skip")}
    found = read_all(out, refused)
    return Part(f"## sparsify → here\n\n{version}, `save_to_disk`.\n\n{found.text}", found.ok)


def dictionary_learning(out: Path) -> Part:
    """All that dictionary_learning's trainers write."""
    version = peer("dictionary_learning", "write_dictionary_learning.py", out)
    found = read_all(out, set())
    text = f"""## dictionary_learning → here

{version}. Forty steps of `trainSAE` with each trainer, on normalised activations; compared with its
`load_dictionary`.

{found.text}"""
    return Part(text, found.ok)
