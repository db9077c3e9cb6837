// The C interface of the CPU kernels, and the choice of instruction set at run time.
//
// The same code (the .inc files) is compiled once for each instruction set, between target options,
// so that one library serves every machine of an architecture. Nothing here needs the C++ runtime
// library or PyTorch's headers; OpenMP's symbols come from the runtime PyTorch has loaded.

#include <cstdlib>

#include "plan.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif

#if defined(__clang__)
#define PRAGMA(text) _Pragma(#text)
#define TARGET_BEGIN(options) \
  PRAGMA(clang attribute push(__attribute__((target(options))), apply_to = function))
#define TARGET_END PRAGMA(clang attribute pop)
#else
#define PRAGMA(text) _Pragma(#text)
#define TARGET_BEGIN(options) PRAGMA(GCC push_options) PRAGMA(GCC target(options))
#define TARGET_END PRAGMA(GCC pop_options)
#endif

namespace dvpa {

namespace plain {
#include "vector_plain.inc"
#include "kernels.inc"
}  // namespace plain

#if defined(__x86_64__)

TARGET_BEGIN("avx2,fma,f16c")
namespace avx2 {
#include "vector_avx2.inc"
#include "kernels.inc"
}  // namespace avx2
TARGET_END

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {
#include "vector_avx512.inc"
#include "kernels.inc"
}  // namespace avx512
TARGET_END

#define DVPA_BF16_DOT
TARGET_BEGIN("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512_bf16 {
#include "vector_avx512.inc"
#include "kernels.inc"
}  // namespace avx512_bf16
TARGET_END

#endif

namespace {

template <class Problem>
using Worker = void (*)(const Problem&);

// By instruction set (plain, avx2, avx512, avx512_bf16), then by number format (fp32, bf16, fp16).
// The bf16 instructions serve products only.
#if defined(__x86_64__)
#define FORMATS(isa, bf16_isa, run) {isa::run<float>, bf16_isa::run<BF16>, isa::run<F16>}
#define SINGLE(run) {plain::run, avx2::run, avx512::run, avx512::run}  // fp32 only
#define WORKERS(run, last_isa)                                                   \
  {FORMATS(plain, plain, run), FORMATS(avx2, avx2, run), FORMATS(avx512, avx512, run), \
   FORMATS(avx512, last_isa, run)}
#else
#define SINGLE(run) {plain::run}
#define WORKERS(run, last_isa) {{plain::run<float>, plain::run<BF16>, plain::run<F16>}}
#endif

const Worker<Experts> EXPERTS[][3] = WORKERS(run_experts, avx512_bf16);
const Worker<Linear> LINEAR[][3] = WORKERS(run_linear, avx512_bf16);
const Worker<Norm> NORM[][3] = WORKERS(run_norm, avx512);
const Worker<Attention> ATTENTION[][3] = WORKERS(run_attention, avx512);
const Worker<Sum> SUM[][3] = WORKERS(run_sum, avx512);
const Worker<Gate> GATE[][3] = WORKERS(run_gate, avx512);
const Worker<Rows> ROWS[][3] = WORKERS(run_rows, avx512);
const Worker<Route> ROUTE[][3] = WORKERS(run_route, avx512);
const Worker<Gather> GATHER[] = SINGLE(run_gather);
const Worker<AddRows> ADD_ROWS[] = SINGLE(run_add_rows);
const Worker<Slope> SLOPE[] = SINGLE(run_slope);

// A team costs some microseconds; below this many multiplications for each thread it does not pay.
constexpr int64_t WORK_PER_THREAD = 1 << 17;

int team_size(int threads, int64_t work) {
  const int64_t useful = 1 + work / WORK_PER_THREAD;
  return threads < useful ? threads : int(useful);
}

template <class Problem>
void run(Worker<Problem> worker, const Problem& problem, int team) {
#pragma omp parallel num_threads(team) if (team > 1)
  worker(problem);
}

// Runs what `plan(arena, counters)` returns; it is called twice, first to count its memory.
template <class Plan, class Run>
int run_planned(Plan plan, Run run) {
  Arena arena = {nullptr};
  Counters counters;
  plan(arena, counters);
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, size_t(arena.used) + 64)) return NO_MEMORY;
  arena = {static_cast<char*>(memory)};
  counters = {};
  auto problem = plan(arena, counters);
  run(problem);
  std::free(memory);
  return NONE;
}

// What every thread of the team runs.
void run_mlp(const Mlp& p, Worker<Linear> linear, Worker<Gate> gate) {
  linear(p.gate_up);
#pragma omp barrier
  gate(p.gate);
#pragma omp barrier
  linear(p.down);
}

// What every thread of the team runs: as many rows at a time as there is room for.
void run_attention(Attention& p, Worker<Attention> worker) {
  while (true) {
#pragma omp single
    next_rows(p);
    if (p.first_row == p.rows) return;
    worker(p);
#pragma omp barrier
  }
}

}  // namespace
}  // namespace dvpa

extern "C" {

#define EXPORT __attribute__((visibility("default")))

// Whether this machine can run an instruction set, numbered as in WORKERS.
EXPORT int dvpa_cpu_supports(int isa) {
  if (isa == 0) return 1;
#if defined(__x86_64__)
  __builtin_cpu_init();
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool f16c = __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  if (isa == 1) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (isa == 2) return avx512;
  if (isa == 3) return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return 0;
}

// See sort_rows. Returns the number of rows, -1 for an index out of range, -2 where memory ran out.
EXPORT int64_t dvpa_cpu_sort_rows(int64_t tokens, int64_t slots, int64_t experts,
                                  const int64_t* index, int64_t* order, int64_t* token_index,
                                  int32_t* expert_offsets, int32_t* token_rows,
                                  int32_t* token_offsets) {
  int32_t* next = static_cast<int32_t*>(std::malloc(size_t(experts + 1) * sizeof(int32_t)));
  if (!next) return -2;
  const int64_t rows = dvpa::sort_rows(tokens, slots, experts, index, order, token_index,
                                       expert_offsets, token_rows, token_offsets, next);
  std::free(next);
  return rows;
}

// y = the experts' weighted sum; see Experts for the operands, which the caller has checked.
// Returns 0, or 1 where memory ran out.
EXPORT int dvpa_cpu_moe_mlp(int isa, int format, int threads, int64_t tokens, int64_t hidden,
                            int64_t width, int64_t experts, const void* x, const void* w_gate_up,
                            const void* w_down, const float* weight, const int64_t* token_index,
                            const int32_t* expert_offsets, const int32_t* token_rows,
                            const int32_t* token_offsets, void* y) {
  using namespace dvpa;
  const int64_t rows = expert_offsets[experts];
  return run_planned(
      [&](Arena& arena, Counters& counters) {
        Experts p = plan_experts(x, w_gate_up, w_down, y, tokens, hidden, width, experts, rows,
                                 arena, counters);
        p.weight = weight, p.token_index = token_index, p.expert_offsets = expert_offsets;
        p.token_rows = token_rows, p.token_offsets = token_offsets;
        return p;
      },
      [&](Experts& p) {
        find_used(p);
        run(EXPERTS[isa][format], p, team_size(threads, 3 * rows * hidden * width));
      });
}

// See Linear for the operands, which the caller has checked. Returns 0, or 1 where memory ran out.
EXPORT int dvpa_cpu_linear(int isa, int format, int threads, int64_t tokens, int64_t groups,
                           int64_t depth, int64_t columns, const void* x, const void* weight,
                           const void* bias, void* y) {
  using namespace dvpa;
  return run_planned(
      [&](Arena& arena, Counters& counters) {
        return plan_linear(x, weight, bias, y, tokens, groups, depth, columns, threads, arena,
                           counters);
      },
      [&](const Linear& p) {
        run(LINEAR[isa][format], p, team_size(threads, tokens * groups * depth * columns));
      });
}

// A SwiGLU MLP. x [T, D], w_gate_up [2F, D], w_down [D, F], y [T, D], which the caller has checked.
// Returns 0, or 1 where memory ran out.
EXPORT int dvpa_cpu_swiglu(int isa, int format, int threads, int64_t tokens, int64_t hidden,
                           int64_t width, const void* x, const void* w_gate_up, const void* w_down,
                           void* y) {
  using namespace dvpa;
  return run_planned(
      [&](Arena& arena, Counters& counters) {
        return plan_mlp(x, w_gate_up, w_down, y, tokens, hidden, width, threads, arena, counters);
      },
      [&](const Mlp& p) {
#pragma omp parallel num_threads(team_size(threads, 3 * tokens * hidden * width))
        run_mlp(p, LINEAR[isa][format], GATE[isa][format]);
      });
}

// See Route for the operands, which the caller has checked, but for the values of `tiers`. `index`
// and `weights` are [T, slots]. Returns 0, 1 where memory ran out, or 6 for a tier out of range.
EXPORT int dvpa_cpu_route(int isa, int format, int threads, int64_t tokens, int64_t hidden,
                          int64_t experts, int64_t max_tier, int64_t slots,
                          const dvpa::RouterTable* table, const void* x, const void* weight,
                          const float* tier_bias, const int64_t* tiers, int64_t* index,
                          float* weights) {
  using namespace dvpa;
  if (!are_tiers(tiers, tokens, max_tier + 1)) return BAD_TIER;
  return run_planned(
      [&](Arena& arena, Counters& counters) {
        Route p = plan_route(x, weight, tier_bias, *table, tiers, tokens, hidden, experts, arena,
                             counters);
        p.slots = slots, p.index = index, p.score = weights;
        return p;
      },
      [&](const Route& p) {
        run(ROUTE[isa][format], p, team_size(threads, tokens * hidden * p.pool_present));
      });
}

// Rotated queries and cache rows; see Rows for the operands, which the caller has checked, but for
// the values of `slots`. `out` is [T, H, N + P]. Returns 0, or 5 for a slot out of range.
EXPORT int dvpa_cpu_latent_rows(int isa, int format, int threads, int64_t tokens, int64_t heads,
                                int64_t nope, int64_t rope, int64_t latent, int64_t query_token,
                                int64_t row_token, int64_t cache_rows, float epsilon,
                                int interleaved, const void* query, const void* row,
                                const void* norm, const void* cos, const void* sin,
                                const int64_t* slots, void* cache, void* out) {
  using namespace dvpa;
  if (!are_slots(slots, tokens, cache_rows)) return BAD_SLOT;
  int64_t next_item = 0;
  const Rows p = {query,       row,         norm,  cos,       sin,         slots,       cache,
                  out,         tokens,      heads, nope,      rope,        latent,      query_token,
                  row_token,   nope + rope, nope,  epsilon,   interleaved != 0, true,   &next_item};
  run(ROWS[isa][format], p, team_size(threads, 8 * tokens * (heads + 1) * (nope + rope)));
  return NONE;
}

// See Norm for the operands, which the caller has checked.
EXPORT void dvpa_cpu_rms_norm(int isa, int format, int threads, int64_t tokens, int64_t size,
                              float epsilon, void* x, const void* weight, void* y) {
  using namespace dvpa;
  int64_t next_item = 0;
  const Norm problem = {x, nullptr, weight, y, tokens, size, size, epsilon, &next_item};
  run(NORM[isa][format], problem, team_size(threads, 4 * tokens * size));
}

// See Attention for the operands; the caller has checked shapes, not values. Returns 0, 1 where
// memory ran out, 2 for a row_sequence, 3 for a row_length and 4 for a needed page out of range.
EXPORT int dvpa_cpu_attention(int isa, int format, int threads, int64_t rows, int64_t heads,
                              int64_t width, int64_t value_width, int64_t cache_pages,
                              int64_t page_size, int64_t sequences, int64_t pages, float scaling,
                              const void* q, const void* cache, const int32_t* page_table,
                              const int32_t* row_sequence, const int32_t* row_length, void* out) {
  using namespace dvpa;
  Attention operands = {q,     cache, page_table,  row_sequence, row_length, out,
                        heads, width, value_width, page_size,    pages,      scaling, rows};
  Extent extent;
  const Fault fault = check_rows(operands, sequences, cache_pages, &extent);
  if (fault) return fault;
  const int team = team_size(threads, extent.positions * heads * (width + value_width));
  return run_planned(
      [&](Arena& arena, Counters& counters) {
        Attention p = operands;
        plan_attention(p, extent, team, arena, counters);
        return p;
      },
      [&](Attention& p) {
        count_splits(p);
#pragma omp parallel num_threads(team) if (team > 1)
        run_attention(p, ATTENTION[isa][format]);
      });
}
}

#include "layer.inc"
#include "train_calls.inc"
