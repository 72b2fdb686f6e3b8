"""The operations of generation against what they say, written out in fp64, for every version; pages hold NaN wherever
nothing was stored.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from ppomax.kernels import decoding_c, native
from ppomax.kernels.decoding import DecodingOps, decoding_ops, flash_attention, takes_flash_attention
from ppomax.kernels.paged_attention import paged_attention
from ppomax.kernels.sampling_reference import TOP_P_BITS, filtered, share_word

HAS_C = True

REQUESTS = ((1, 1), (1, 40), (1, 700), (64, 64), (3, 200), (130, 131), (1, 64), (1, 65))
"""(queries, context): decoding, whole prompts, pieces of prompts; around the C kernel's blocks of 64 keys."""


def ops_for(d: int, heads: int = 2) -> DecodingOps:
    return decoding_ops(torch.zeros(1), head_dim=d, heads_per_group=heads, page_size=32)


def normal(*sizes: int, seed: int = 0) -> Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [1, 16, 100, 384])
def test_rms_norm(size: int) -> None:
    x, weight = normal(7, 2 * size)[:, :size] * 3, normal(size, seed=1)
    exact = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(ops_for(16).rms_norm(x, weight, 1e-5).double(), exact, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [(0, 8, 40), (1, 1, 1), (5, 40, 31), (12, 64, 96), (13, 384, 33), (96, 65, 200), (150, 30, 70)],
)
def test_products(rows: int, inputs: int, outputs: int) -> None:
    ops = ops_for(16)
    x, weight, y = normal(rows, inputs), normal(outputs, inputs, seed=1), normal(rows, outputs, seed=2)
    matrix = ops.matrix(weight)
    exact = x.double() @ weight.double().T
    torch.testing.assert_close(ops.product(x, matrix).double(), exact, atol=1e-6 * inputs, rtol=0)
    before = y.clone()
    assert ops.add_product(y, x, matrix) is y
    torch.testing.assert_close(y.double(), before + exact, atol=1e-6 * inputs, rtol=0)


@pytest.mark.one_version
def test_a_row_of_a_c_product_has_the_same_bits_in_any_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PPOMAX_KERNELS", "cpu")
    ops, x, weight = ops_for(16), normal(30, 77), normal(90, 77, seed=1)
    matrix = ops.matrix(weight)
    whole = ops.product(x, matrix)
    for start, stop in ((0, 1), (3, 17), (29, 30)):
        assert torch.equal(ops.product(x[start:stop], matrix), whole[start:stop])


def test_swiglu_for_gates_of_any_size() -> None:
    gates = torch.tensor([-1e30, -100.0, -88.0, -20.0, -1.0, 0.0, 1e-3, 1.0, 20.0, 88.0, 100.0, 1e30])
    gate_up = torch.cat([gates, normal(len(gates))]).repeat(3, 1)
    gate, up = gate_up.double().chunk(2, dim=1)
    torch.testing.assert_close(ops_for(16).swiglu(gate_up).double(), gate.sigmoid() * gate * up, atol=1e-6, rtol=2e-6)


def test_nan_and_infinity_are_not_hidden() -> None:
    for bad in (torch.nan, torch.inf):
        x = normal(2, 32)
        x[0, 3] = bad
        assert ops_for(16).rms_norm(x, torch.ones(32), 1e-6)[0].isnan().any()
    assert ops_for(16).swiglu(torch.tensor([[torch.nan, 1.0]])).isnan().all()


class Scene:
    """Requests on shuffled pages, and the keys and values [context, groups, d] of each."""

    def __init__(self, groups: int, heads: int, d: int, page_size: int) -> None:
        generator = torch.Generator().manual_seed(d + page_size)
        contexts = [context for _, context in REQUESTS]
        width = -(-max(contexts) // page_size)
        pages = torch.randperm(len(REQUESTS) * width, generator=generator).view(len(REQUESTS), width)
        self.key_pages, self.value_pages = torch.full((2, pages.numel(), page_size, groups, d), torch.nan)
        self.keys = [normal(context, groups, d, seed=context) for context in contexts]
        self.values = [normal(context, groups, d, seed=context + 1) for context in contexts]
        for table, key, value in zip(pages, self.keys, self.values, strict=True):
            t = torch.arange(len(key))
            self.key_pages[table[t // page_size], t % page_size] = key
            self.value_pages[table[t // page_size], t % page_size] = value
        first_page = torch.arange(width) * page_size
        self.tables = torch.where(first_page < torch.tensor(contexts)[:, None], pages, 2**31 - 1).int()
        self.contexts = torch.tensor(contexts, dtype=torch.int32)
        counts = torch.tensor([0, *(count for count, _ in REQUESTS)], dtype=torch.int32)
        self.cu_queries = counts.cumsum(0, dtype=torch.int32)
        self.query = normal(int(counts.sum()) + 2, groups * heads, d)  # two rows of padding

    def attend(self, ops: DecodingOps) -> Tensor:
        return ops.paged_attention(
            self.query,
            self.key_pages,
            self.value_pages,
            self.tables,
            self.contexts,
            self.cu_queries,
            max_query=max(count for count, _ in REQUESTS),
            max_context=max(context for _, context in REQUESTS),
        )

    def exact(self) -> Tensor:
        """Request by request, query by query."""
        output = torch.zeros(self.query.shape, dtype=torch.float64)
        heads_per_group = self.query.shape[1] // self.key_pages.shape[2]
        starts = self.cu_queries.tolist()
        for (count, context), start, key, value in zip(REQUESTS, starts, self.keys, self.values, strict=False):
            key, value = (x.double().repeat_interleave(heads_per_group, dim=1) for x in (key, value))
            for i in range(count):
                seen = context - count + i + 1
                scores = torch.einsum("hd,thd->ht", self.query[start + i].double(), key[:seen])
                p = (scores * self.query.shape[2] ** -0.5).softmax(dim=1)
                output[start + i] = torch.einsum("ht,thd->hd", p, value[:seen])
        return output


@pytest.mark.parametrize(
    ("groups", "heads", "d", "page_size"),
    [(2, 2, 32, 32), (1, 1, 16, 1), (2, 1, 64, 7), (1, 12, 128, 16), (3, 5, 48, 100), (40, 2, 16, 16)],
)
def test_paged_attention(request: pytest.FixtureRequest, groups: int, heads: int, d: int, page_size: int) -> None:
    if "triton" in request.node.callspec.id and (page_size == 1 or groups == 40):
        pytest.skip(reason="too slow in the interpreter, and covered by test_paged_attention.py")
    scene = Scene(groups, heads, d, page_size)
    output = scene.attend(ops_for(d, heads))
    torch.testing.assert_close(output.double(), scene.exact(), atol=3e-6, rtol=0)
    assert not output[-2:].any()


@pytest.mark.one_version
def test_c_attention_gives_the_same_bits_for_any_page_size_and_number_of_threads(monkeypatch) -> None:
    monkeypatch.setenv("PPOMAX_KERNELS", "cpu")
    results = []
    for page_size, threads in ((16, 1), (16, 2), (5, 3)):
        torch.set_num_threads(threads)
        scene = Scene(2, 2, 32, page_size)
        scene.query = normal(*scene.query.shape)
        results.append(scene.attend(ops_for(32)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.one_version
@pytest.mark.parametrize("bias", [False, True])
def test_whole_layers_are_their_operations_one_by_one_however_threads_share_them(monkeypatch, bias: bool) -> None:
    """Threads take requests where weights are in the cache, else parts of each operation."""
    monkeypatch.setenv("PPOMAX_KERNELS", "cpu")
    if native.load() is None:
        pytest.skip(reason="there is no C compiler")
    groups, heads, d, page_size, size, wide, num_layers = 2, 2, 32, 8, 96, 160, 3
    ops = ops_for(d, heads)
    counts = [1, 1, 7, 1, 23, 1, 1, 40, 1]
    cu_queries = torch.tensor([0, *counts]).cumsum(0, dtype=torch.int32)
    num_tokens, width = int(cu_queries[-1]), 6
    contexts = torch.tensor([count + 4 for count in counts], dtype=torch.int32)
    tables = torch.randperm(len(counts) * width).view(len(counts), width).int()
    places = [torch.arange(context - count, context) for count, context in zip(counts, contexts.tolist(), strict=True)]
    slots = torch.cat([t[p // page_size] * page_size + p % page_size for t, p in zip(tables, places, strict=True)])
    weights = [
        (
            normal(size, seed=i) + 1,
            ops.matrix(normal(groups * (heads + 2) * d, size, seed=i) / 10),
            normal(groups * (heads + 2) * d, seed=i) if bias else None,
            ops.matrix(normal(size, groups * heads * d, seed=i) / 10),
            normal(size, seed=i + 9) + 1,
            ops.matrix(normal(2 * wide, size, seed=i + 9) / 10),
            ops.matrix(normal(size, wide, seed=i) / 10),
        )
        for i in range(num_layers)
    ]
    cos, sin = normal(num_tokens, d // 2, seed=3), normal(num_tokens, d // 2, seed=4)
    hidden, cache = normal(num_tokens, size, seed=5), normal(2, num_layers, len(counts) * width, page_size, groups, d)

    def decoded(num_threads: int, are_in_cache: bool) -> tuple[Tensor, Tensor]:
        torch.set_num_threads(num_threads)
        layers = decoding_c.Layers(weights)
        assert layers.are_in_cache
        layers.are_in_cache = are_in_cache
        x, pages = hidden.clone(), cache.clone()
        seen = (slots.int(), tables, contexts, cu_queries)
        decoding_c.decode(x, layers, cos, sin, pages[0], pages[1], *seen, heads_per_group=heads, eps=1e-5)
        return x, pages

    x, pages = hidden.clone(), cache.clone()
    for i, (input_norm, qkv, qkv_bias, projection, mlp_norm, gate_up, down) in enumerate(weights):
        mixed = ops.product(ops.rms_norm(x, input_norm, 1e-5), qkv)
        mixed = mixed if qkv_bias is None else mixed + qkv_bias
        query = ops.rope_store(mixed.view(-1, groups, heads + 2, d), cos, sin, pages[0, i], pages[1, i], slots.int())
        seen = (tables, contexts, cu_queries)
        attended = ops.paged_attention(query, pages[0, i], pages[1, i], *seen, max_query=40, max_context=44)
        x = ops.add_product(x, attended.flatten(1), projection)
        x = ops.add_product(x, ops.swiglu(ops.product(ops.rms_norm(x, mlp_norm, 1e-5), gate_up)), down)
    for num_threads in (1, 2, 3, 5, 16):
        for are_in_cache in (True, False):
            got, got_pages = decoded(num_threads, are_in_cache)
            assert torch.equal(got, x), (num_threads, are_in_cache)
            assert torch.equal(got_pages, pages)


@pytest.mark.one_version
def test_flash_attention_gets_what_it_wants_and_only_decoding_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its documented semantics in its place: [R, 1, heads, d] queries, block tables, causal from the right."""
    calls = []

    def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, block_table, causal):
        calls.append(len(q))
        assert causal
        outputs = []
        for query, length, table in zip(q, cache_seqlens.tolist(), block_table, strict=True):
            used = table[: -(-length // k_cache.shape[1])].long()
            key, value = (x[used].flatten(0, 1)[:length].transpose(0, 1) for x in (k_cache, v_cache))
            attend = torch.nn.functional.scaled_dot_product_attention
            outputs.append(attend(query.transpose(0, 1), key, value, enable_gqa=True).transpose(0, 1))
        return torch.stack(outputs)

    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache))
    monkeypatch.setenv("PPOMAX_KERNELS", "reference")
    scene = Scene(2, 2, 16, 32)
    single = [r for r, (count, _) in enumerate(REQUESTS) if count == 1]
    tensors = (scene.key_pages, scene.value_pages, scene.tables[single], scene.contexts[single])
    query, ends = scene.query[: len(single)], torch.arange(len(single) + 1, dtype=torch.int32)
    bounds = {"max_query": 1, "max_context": 700}
    output = flash_attention(query, *tensors, ends, **bounds)
    torch.testing.assert_close(output, paged_attention(query, *tensors, ends, **bounds), atol=3e-6, rtol=0)
    assert calls == [len(single)]
    mixed = ops_for(16)._replace(paged_attention=flash_attention)
    torch.testing.assert_close(scene.attend(mixed).double(), scene.exact(), atol=3e-6, rtol=0)
    assert len(calls) == 1


@pytest.mark.one_version
def test_flash_attention_is_not_taken_for_other_pages_types_or_devices() -> None:
    assert not takes_flash_attention(torch.zeros(1), 256)
    assert not takes_flash_attention(torch.zeros(1, dtype=torch.bfloat16), 256)


@pytest.mark.one_version
def test_a_machine_without_a_compiler_uses_the_references(tmp_path: Path) -> None:
    code = (
        "import torch; from ppomax.kernels import native; from ppomax.kernels.decoding import decoding_ops\n"
        "assert native.load() is None\n"
        "ops = decoding_ops(torch.zeros(1), head_dim=16, heads_per_group=1, page_size=1)\n"
        "print(ops.swiglu(torch.ones(1, 2)).item())"
    )
    environment = {**os.environ, "PATH": str(tmp_path), "CC": "", "PPOMAX_KERNELS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert float(done.stdout) == pytest.approx(0.7310586), done.stderr


@pytest.mark.one_version
@pytest.mark.parametrize("fault", ["compiler", "cache"])
def test_a_broken_compiler_warns_and_a_folder_of_others_is_not_used(tmp_path: Path, fault: str) -> None:
    environment = {**os.environ, "PPOMAX_CACHE": str(tmp_path), "PPOMAX_KERNELS": "cpu"}
    if fault == "compiler":
        compiler = tmp_path / "broken"
        compiler.write_text('#!/bin/sh\necho broken >&2; [ "$1" = --version ]\n')
        compiler.chmod(0o755)
        environment["CC"] = str(compiler)
    else:
        tmp_path.chmod(0o777)
    code = "from ppomax.kernels import native; print(native.load() is not None)"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if fault == "compiler":
        assert done.stdout.strip() == "False"
        assert "cannot be compiled" in done.stderr
        assert "broken" in done.stderr
    else:
        assert done.stdout.strip() == "True"
        assert not list(tmp_path.iterdir())


@pytest.mark.one_version
def test_the_library_is_compiled_once(tmp_path: Path) -> None:
    environment = {**os.environ, "PPOMAX_CACHE": str(tmp_path / "cache"), "PPOMAX_KERNELS": "cpu"}
    code = "from ppomax.kernels import native; assert native.load() is not None"
    written = []
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], env=environment, check=True)
        (library,) = (tmp_path / "cache").iterdir()
        written.append((library.name, library.stat().st_mtime_ns))
    assert written[0] == written[1]
    assert all(source.exists() for source in native.SOURCES)


@pytest.mark.one_version
def test_a_damaged_library_is_compiled_again_in_a_relative_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    environment = {**os.environ, "PPOMAX_CACHE": ".", "PPOMAX_KERNELS": "cpu"}
    code = "from ppomax.kernels import native; assert native.load() is not None"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, cwd=tmp_path)
        (library,) = tmp_path.iterdir()
        assert library.stat().st_size > 0
        library.write_bytes(b"")


@pytest.mark.one_version
@pytest.mark.parametrize("top_k", [0, 1, 7, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
def test_c_filters_keep_what_the_reference_keeps(top_k: int, top_p: float) -> None:
    """Scores with ties, far below the best, banned, infinite; no float of what is kept changes."""
    if native.load() is None:
        pytest.skip(reason="there is no C compiler")
    scores = normal(9, 301) * torch.tensor([0.0, 1e-9, 0.1, 1, 3, 30, 1e4, 1e12, 1])[:, None]
    scores[:, 10:30] = scores[:, 40:60]
    scores[8, ::2] = -torch.inf
    scores[7, 5] = torch.inf
    expected = filtered(scores, top_k=top_k, top_p=top_p)
    part = share_word(top_p) if top_p < 1 else 1 << TOP_P_BITS
    space = torch.empty(torch.get_num_threads(), 2, 301, dtype=torch.int64)
    result = scores.clone()
    native.call("filter_scores", result, space, *scores.shape, scores.stride(0), top_k, part)
    assert torch.equal(result, expected)


@pytest.mark.one_version
@pytest.mark.parametrize("version", ["cpu", "reference"])
def test_time_grows_with_tokens_not_with_the_longest_context(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """63 short contexts and a long one hold a fiftieth of the tokens of 64 long ones."""
    monkeypatch.setenv("PPOMAX_KERNELS", version)
    short, long, page_size = 16, 4096, 32
    pages = torch.zeros(64 * long // page_size, page_size, 1, 16)
    tables = torch.arange(len(pages), dtype=torch.int32).view(64, -1)
    attend = ops_for(16, 1).paged_attention

    def seconds(contexts: list[int]) -> float:
        lengths, ends = torch.tensor(contexts, dtype=torch.int32), torch.arange(65, dtype=torch.int32)
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            attend(torch.zeros(64, 1, 16), pages, pages, tables, lengths, ends, max_query=1, max_context=long)
            times.append(time.perf_counter() - begin)
        return min(times)

    assert seconds([short] * 63 + [long]) < 0.2 * seconds([long] * 64)
