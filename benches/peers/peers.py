#!/usr/bin/env python3
"""Times other libraries on the cases of `cubesla bench`, into the same kind of file.

    python3 peers.py --json peers.json [--sla FOLDER] [--filter SUBSTR] [--series]

Measured as `cubesla bench` measures: random normal inputs in so many copies that none is left in the
cache, warm-up, then batches of calls of at least 20 ms between two events; the median over batches.
What a machine lacks is left out, with the reason.

FOLDER holds the package `sparse_linear_attention` of https://github.com/thu-ml/SLA.
"""

import argparse
import importlib
import json
import math
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

# crates/cubesla-cli/src/bench/cases/mod.rs has the same: B, H, L, D.
SIZES = [(1, 12, 32760, 128), (2, 16, 32760, 128), (1, 12, 32760, 64), (1, 40, 75600, 128)]
# So many of them are measured in all variants of sparse attention.
FULL = 2
SPARSITIES = [0, 90, 95, 97]
LOW_BITS = ["int8", "int8-fp8", "fp8"]
SERIES_LENGTHS = [4096, 8192, 16384, 32768, 65536, 131072]
SERIES_SPARSITIES = [0, 25, 50, 75, 85, 90, 95, 97, 99]
TOP_K = [(40 * 591, 1182, 35), (12 * 256, 512, 25), (8192, 256, 8)]
# Low-bit products: variant, M, N, K.
MATMULS = [
    ("int8", 8192, 8192, 8192),
    ("fp8", 8192, 8192, 8192),
    # More rows than 16 are all that torch._int_mm takes: bf16 stands beside INT8.
    ("int8", 16, 8192, 8192),
    ("fp8", 16, 8192, 8192),
    ("w4a16", 1, 8192, 8192),
    ("w4a16", 16, 4096, 4096),
    # torch has none of these: bf16 stands beside them.
    ("w8a16-int8", 1, 8192, 8192),
    ("w8a16-fp8", 1, 8192, 8192),
]
BLOCK_Q, BLOCK_K = 128, 64

CACHE = 128 << 20
BATCH_MS = 20.0
BUDGET_MS = 10_000.0


def name(operation, variant, size):
    b, h, l, d = size
    return f"{operation}/{variant}/b{b}h{h}l{l}d{d}/bf16"


def variant(sparsity):
    return "dense" if sparsity == 0 else str(sparsity)


def kept(sparsity):
    return (100 - sparsity) / 100


def qkv(size):
    return [torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def qkv_bytes(size):
    return 3 * 2 * math.prod(size)


def sdpa(backend):
    def make(size, sparsity):
        q, k, v = qkv(size)

        def call():
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return call

    return make


_compiled = {}


def flex(size, sparsity):
    """Blocks of 128x128, which it is fastest with, and a length that they divide."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    # One program for each size, and there are more sizes than the default limit.
    torch._dynamo.config.cache_size_limit = 64
    attention = _compiled.setdefault("flex", torch.compile(flex_attention, dynamic=False))
    b, h, l, d = size
    block = 128
    n = -(-l // block)
    q, k, v = qkv((b, h, n * block, d))
    count = max(1, int(kept(sparsity) * n))
    indices = torch.rand(b, h, n, n, device="cuda").argsort(dim=-1).to(torch.int32)
    # Full blocks need no mask; the first `count` of each row of indices are used.
    indices[..., :count] = indices[..., :count].sort(dim=-1).values
    full = torch.full((b, h, n), count, device="cuda", dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(full), indices, full, indices, BLOCK_SIZE=(block, block)
    )
    return lambda: attention(q, k, v, block_mask=mask)


def sla_sparse(sla):
    def make(size, sparsity):
        q, k, v = qkv(size)
        block_map, lut, count = sla.get_block_map(q, k, kept(sparsity), BLOCK_Q, BLOCK_K)
        return lambda: sla.attention.apply(q, k, v, block_map, lut, count, BLOCK_Q, BLOCK_K)

    return make


def gradients(forward, inputs, weights=()):
    """The backward alone of `forward`, whose graph is kept, for inputs and weights."""
    for x in inputs:
        x.requires_grad_()
    with torch.enable_grad():
        out = forward(*inputs)
    grad = torch.randn_like(out)
    of = [*inputs, *weights]
    return lambda: torch.autograd.grad(out, of, grad, retain_graph=True)


def sdpa_backward(backend):
    def make(size, sparsity):
        def forward(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return gradients(forward, qkv(size))

    return make


def sla_backward(sla):
    def make(size, sparsity):
        q, k, v = qkv(size)
        block_map, lut, count = sla.get_block_map(q, k, kept(sparsity), BLOCK_Q, BLOCK_K)

        def forward(q, k, v):
            return sla.attention.apply(q, k, v, block_map, lut, count, BLOCK_Q, BLOCK_K)

        return gradients(forward, [q, k, v])

    return make


def sla_router(sla):
    def make(size):
        q, k, _ = qkv(size)
        return lambda: sla.get_block_map(q, k, kept(95), BLOCK_Q, BLOCK_K)

    return make


def new_module(sla, size):
    return sla.module(
        head_dim=size[3], topk=kept(95), feature_map="softmax", BLKQ=BLOCK_Q, BLKK=BLOCK_K
    ).cuda()


def sla_module(sla):
    def make(size):
        q, k, v = qkv(size)
        module = new_module(sla, size)
        return lambda: module(q, k, v)

    return make


def sla_module_backward(sla):
    """Of the inputs and the projection; nothing flows into the router."""

    def make(size):
        module = new_module(sla, size)
        return gradients(module, qkv(size), module.parameters())

    return make


def linear(size):
    q, k, v = qkv(size)

    def call():
        phi_q, phi_k = q.softmax(dim=-1), k.softmax(dim=-1)
        h = phi_k.transpose(-1, -2) @ v
        z = phi_k.sum(dim=-2, keepdim=True)
        return (phi_q @ h) / (phi_q * z).sum(dim=-1, keepdim=True)

    return call


def top_k(rows, length, k):
    x = torch.randn(rows, length, device="cuda")
    return lambda: torch.topk(x, k, dim=-1)


def matmul_bf16(m, n, k):
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
    return lambda: x @ w.t()


def matmul_int8(m, n, k):
    """Sums alone, in int32: no scales."""
    x = torch.randint(-127, 128, (m, k), device="cuda", dtype=torch.int8)
    w = torch.randint(-127, 128, (n, k), device="cuda", dtype=torch.int8)
    return lambda: torch._int_mm(x, w.t())


def matmul_fp8(m, n, k):
    x = torch.randn(m, k, device="cuda").to(torch.float8_e4m3fn)
    w = torch.randn(n, k, device="cuda").to(torch.float8_e4m3fn)
    x_scale = torch.rand(m, 1, device="cuda")
    w_scale = torch.rand(1, n, device="cuda")
    return lambda: torch._scaled_mm(
        x, w.t(), scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16
    )


def matmul_w4a16(m, n, k):
    """tinygemm: groups of 128 with bf16 scales and zeros."""
    group = 128
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    w = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(w, 8)
    scales = torch.rand(k // group, n, 2, device="cuda", dtype=torch.bfloat16)
    return lambda: torch.ops.aten._weight_int4pack_mm(x, packed, group, scales)


def matmul_jobs():
    """Every implementation of each product, and the same product in bf16."""
    peers = {
        "int8": ("torch-int-mm", matmul_int8, 1),
        "fp8": ("torch-scaled-mm", matmul_fp8, 1),
        "w4a16": ("torch-tinygemm", matmul_w4a16, 0.5),
    }
    for kind, m, n, k in MATMULS:
        case = f"matmul/{kind}/m{m}n{n}k{k}/bf16"
        elements = (m + n) * k
        if kind in peers:
            peer, make, width = peers[kind]
            yield case, peer, int(elements * width), lambda make=make, at=(m, n, k): make(*at)
        yield case, "torch-bf16", 2 * elements, lambda at=(m, n, k): matmul_bf16(*at)


class Sla:
    """What is used of thu-ml/SLA."""

    def __init__(self, folder):
        sys.path.insert(0, folder)
        package = "sparse_linear_attention"
        self.attention = importlib.import_module(f"{package}.kernel")._attention
        self.get_block_map = importlib.import_module(f"{package}.utils").get_block_map
        self.module = importlib.import_module(f"{package}.core").SparseLinearAttention


def sparse_jobs(size, sparsity, sla):
    """Every implementation of sparse attention, or of dense attention at a sparsity of 0."""
    if sparsity == 0:
        makes = {
            "torch-flash2": sdpa(SDPBackend.FLASH_ATTENTION),
            "torch-cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        }
    else:
        makes = {"flex-attention-128x128": flex}
        if sla:
            makes["sla-triton"] = sla_sparse(sla)
    case = name("sparse_forward", variant(sparsity), size)
    for implementation, make in makes.items():
        yield case, implementation, qkv_bytes(size), lambda make=make: make(size, sparsity)
    if sparsity and sla:
        # In 16 bits: the peer of low bits too.
        make = sla_sparse(sla)
        for formats in LOW_BITS:
            case = name(f"low_bit_forward/{formats}", variant(sparsity), size)
            yield case, "sla-triton", qkv_bytes(size), lambda: make(size, sparsity)


def backward_jobs(size, sparsity, sla):
    """Every implementation of the gradient of sparse attention, or of dense attention."""
    makes = {}
    if sparsity == 0:
        makes["torch-flash2"] = sdpa_backward(SDPBackend.FLASH_ATTENTION)
        makes["torch-cudnn"] = sdpa_backward(SDPBackend.CUDNN_ATTENTION)
    elif sla:
        makes["sla-triton"] = sla_backward(sla)
    case = name("sparse_backward", variant(sparsity), size)
    for implementation, make in makes.items():
        yield case, implementation, qkv_bytes(size), lambda make=make: make(size, sparsity)


def jobs(sla, series):
    """`(case, implementation, bytes of the inputs, make)`, where make() returns the call."""
    if series:
        main = SIZES[0]
        for length in SERIES_LENGTHS:
            for sparsity in (0, 95):
                yield from sparse_jobs((main[0], main[1], length, main[3]), sparsity, sla)
        for sparsity in SERIES_SPARSITIES:
            yield from sparse_jobs(main, sparsity, sla)
        return
    for at, size in enumerate(SIZES):
        for sparsity in SPARSITIES if at < FULL else [95]:
            yield from sparse_jobs(size, sparsity, sla)
            yield from backward_jobs(size, sparsity, sla)
        case = name("linear", "softmax", size)
        yield case, "torch-eager", qkv_bytes(size), lambda size=size: linear(size)
        if sla:
            router, module, backward = sla_router(sla), sla_module(sla), sla_module_backward(sla)
            case = name("route", "95", size)
            yield case, "sla-block-map", qkv_bytes(size), lambda size=size: router(size)
            case = name("sla_forward", "95-global", size)
            yield case, "sla-module", qkv_bytes(size), lambda size=size: module(size)
            # SLA's, whose branches are those of SLA2, is the peer of both.
            for operation in ("sla_backward", "sla2_backward"):
                case = name(operation, "95-global", size)
                yield case, "sla-module", qkv_bytes(size), lambda size=size: backward(size)
    for rows, length, k in TOP_K:
        case = f"top_k/k{k}/r{rows}n{length}/f32"
        inputs = (rows, length, k)
        yield case, "torch-topk", 4 * rows * length, lambda inputs=inputs: top_k(*inputs)
    yield from matmul_jobs()


def measure(calls, runs):
    """Milliseconds of a call, over batches in which the calls take turns."""
    number = 0

    def batch(size):
        nonlocal number
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(size):
            calls[number % len(calls)]()
            number += 1
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    batch(max(3, len(calls)))
    size = 1
    while size < 1024 and batch(size) < BATCH_MS:
        size *= 2
    wanted = max(10, -(-runs // size))
    times, spent = [], 0.0
    while len(times) < wanted and (len(times) < 3 or spent < BUDGET_MS):
        elapsed = batch(size)
        spent += elapsed
        times.append(elapsed / size)
    return times, size


def percentile(values, percent):
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    below, above = math.floor(at), math.ceil(at)
    return ordered[below] + (ordered[above] - ordered[below]) * (at - below)


def entry(case, implementation, times, size):
    return {
        "case": case,
        "implementation": implementation,
        "median_ms": percentile(times, 50),
        "p10_ms": percentile(times, 10),
        "p90_ms": percentile(times, 90),
        "calls": len(times) * size,
    }


def write(path, results):
    document = {
        "device": torch.cuda.get_device_name(),
        "software": f"torch {torch.__version__}, CUDA {torch.version.cuda}",
        "results": results,
    }
    with open(path, "w") as file:
        json.dump(document, file, indent=2)
        file.write("\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", required=True, metavar="FILE", help="write the results here")
    parser.add_argument("--sla", metavar="FOLDER", help="where sparse_linear_attention lies")
    parser.add_argument("--filter", action="append", default=[], metavar="SUBSTR")
    parser.add_argument("--series", action="store_true", help="the cases of the curves instead")
    parser.add_argument("--runs", type=int, default=100, metavar="N")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    args = parser.parse_args()

    sla = None
    if args.sla:
        try:
            sla = Sla(args.sla)
        except Exception as error:
            print(f"without SLA: {error!r}", file=sys.stderr)

    results = []
    seen = set()
    for case, implementation, size_in_bytes, make in jobs(sla, args.series):
        if args.filter and not any(part in case for part in args.filter):
            continue
        if (case, implementation) in seen:
            continue
        seen.add((case, implementation))
        if args.list:
            print(case, implementation)
            continue
        try:
            torch.manual_seed(0)
            with torch.no_grad():
                copies = min(16, max(1, -(-CACHE // size_in_bytes)))
                calls = [make() for _ in range(copies)]
                times, batch = measure(calls, args.runs)
        except Exception as error:
            reason = str(error).strip().splitlines()[:1]
            print(f"skipped {case} {implementation}: {type(error).__name__} {reason}")
            continue
        finally:
            calls = None
            torch.cuda.empty_cache()
        results.append(entry(case, implementation, times, batch))
        print(f"{case} {implementation}: {results[-1]['median_ms']:.4f} ms", flush=True)
        write(args.json, results)


if __name__ == "__main__":
    main()
