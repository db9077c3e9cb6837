// The C interface of the CPU kernels, and the choice of instruction set at run time.
//
// The same code (the .inc files) is compiled once for each instruction set, between target options,
// so that one library serves every machine of an architecture. Nothing here needs the C++ runtime
// library or PyTorch's headers; OpenMP's symbols come from the runtime PyTorch has loaded.

#include <cstdlib>

#include "problems.h"

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
#define WORKERS(run, last_isa)                                                   \
  {FORMATS(plain, plain, run), FORMATS(avx2, avx2, run), FORMATS(avx512, avx512, run), \
   FORMATS(avx512, last_isa, run)}
#else
#define WORKERS(run, last_isa) {{plain::run<float>, plain::run<BF16>, plain::run<F16>}}
#endif

const Worker<Experts> EXPERTS[][3] = WORKERS(run_experts, avx512_bf16);
const Worker<Linear> LINEAR[][3] = WORKERS(run_linear, avx512_bf16);
const Worker<Norm> NORM[][3] = WORKERS(run_norm, avx512);
const Worker<Attention> ATTENTION[][3] = WORKERS(run_attention, avx512);

// A team costs some microseconds; below this many multiplications for each thread it does not pay.
constexpr int64_t WORK_PER_THREAD = 1 << 17;

// Partial results of attention that are kept at once, in floats.
constexpr int64_t PARTIALS = 1 << 22;

int team_size(int threads, int64_t work) {
  const int64_t useful = 1 + work / WORK_PER_THREAD;
  return threads < useful ? threads : int(useful);
}

template <class Problem>
void run(Worker<Problem> worker, const Problem& problem, int team) {
#pragma omp parallel num_threads(team) if (team > 1)
  worker(problem);
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

// Rows of a routing table [tokens, slots] in one counting sort, stable in slot order; an index of
// `experts` is an empty slot. Fills order and token_index by row, expert_offsets [experts + 1],
// token_rows by token and token_offsets [tokens + 1]. Returns the number of rows, -1 for an index
// out of range, or -2 where memory ran out.
EXPORT int64_t dvpa_cpu_sort_rows(int64_t tokens, int64_t slots, int64_t experts,
                                  const int64_t* index, int64_t* order, int64_t* token_index,
                                  int32_t* expert_offsets, int32_t* token_rows,
                                  int32_t* token_offsets) {
  int32_t* next = static_cast<int32_t*>(std::calloc(size_t(experts) + 1, sizeof(int32_t)));
  if (!next) return -2;
  for (int64_t s = 0; s < tokens * slots; ++s) {
    if (index[s] < 0 || index[s] > experts) {
      std::free(next);
      return -1;
    }
    ++next[index[s]];
  }
  int32_t rows = 0;
  for (int64_t e = 0; e < experts; ++e) {
    expert_offsets[e] = rows;
    rows += next[e];
    next[e] = expert_offsets[e];
  }
  expert_offsets[experts] = rows;
  int32_t placed = 0;
  token_offsets[0] = 0;
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t s = t * slots; s < (t + 1) * slots; ++s) {
      if (index[s] == experts) continue;
      const int32_t row = next[index[s]]++;
      order[row] = s;
      token_index[row] = t;
      token_rows[placed++] = row;
    }
    token_offsets[t + 1] = placed;
  }
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
  const int64_t x_bytes = tokens * round_up(hidden, MAX_CHUNK) * 4;
  const int64_t act_bytes = rows * round_up(width, MAX_CHUNK) * 4;
  const int64_t y_bytes = round_up(rows * hidden * 4, 64);
  const int64_t used_bytes = round_up(experts * 4, 64);
  char* memory = nullptr;
  const int64_t bytes = x_bytes + act_bytes + y_bytes + used_bytes + 64;
  if (posix_memalign(reinterpret_cast<void**>(&memory), 64, size_t(bytes))) return 1;

  int64_t next_item[4] = {0, 0, 0, 0};
  int32_t* used = reinterpret_cast<int32_t*>(memory + x_bytes + act_bytes + y_bytes);
  int64_t num_used = 0;
  for (int64_t e = 0; e < experts; ++e)
    if (expert_offsets[e + 1] > expert_offsets[e]) used[num_used++] = int32_t(e);
  const Experts problem = {
      x, w_gate_up, w_down, weight, token_index, expert_offsets, token_rows, token_offsets, y,
      tokens, hidden, width, experts, used, num_used, memory, memory + x_bytes,
      reinterpret_cast<float*>(memory + x_bytes + act_bytes), next_item};
  run(EXPERTS[isa][format], problem, team_size(threads, 3 * rows * hidden * width));
  std::free(memory);
  return 0;
}

// See Linear for the operands, which the caller has checked. Returns 0, or 1 where memory ran out.
EXPORT int dvpa_cpu_linear(int isa, int format, int threads, int64_t tokens, int64_t groups,
                           int64_t depth, int64_t columns, const void* x, const void* weight,
                           const void* bias, void* y) {
  using namespace dvpa;
  const int64_t rows = tokens * groups;
  char* memory = nullptr;
  const size_t bytes = size_t(rows * round_up(depth, MAX_CHUNK) * 4 + 64);
  if (posix_memalign(reinterpret_cast<void**>(&memory), 64, bytes)) return 1;
  // Equal blocks of rows, and smaller ones where there are too few items for the team.
  int64_t blocks = (tokens + LINEAR_ROWS - 1) / LINEAR_ROWS;
  const int64_t panels = groups * (round_up(columns, COLUMNS) / COLUMNS);
  while (panels * blocks < 2 * threads && tokens / blocks >= LINEAR_ROWS / 4) blocks *= 2;
  int64_t next_item[2] = {0, 0};
  const Linear problem = {x,     weight, bias,    y,
                          tokens, groups, depth,   columns,
                          (tokens + blocks - 1) / blocks, memory, next_item};
  run(LINEAR[isa][format], problem, team_size(threads, rows * depth * columns));
  std::free(memory);
  return 0;
}

// See Norm for the operands, which the caller has checked.
EXPORT void dvpa_cpu_rms_norm(int isa, int format, int threads, int64_t tokens, int64_t size,
                              float epsilon, const void* x, const void* weight, void* y) {
  using namespace dvpa;
  int64_t next_item = 0;
  const Norm problem = {x, weight, y, tokens, size, epsilon, &next_item};
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
  int64_t* first_split = static_cast<int64_t*>(std::malloc(size_t(rows + 1) * sizeof(int64_t)));
  if (!first_split) return 1;
  first_split[0] = 0;
  int fault = 0;
  int64_t positions = 0;
  for (int64_t r = 0; r < rows && !fault; ++r) {
    const int64_t sequence = row_sequence[r], length = row_length[r];
    if (sequence < 0 || sequence >= sequences) fault = 2;
    if (length < 0 || length > pages * page_size) fault = 3;
    for (int64_t i = 0; !fault && i * page_size < length; ++i) {
      const int64_t page = page_table[sequence * pages + i];
      if (page < 0 || page >= cache_pages) fault = 4;
    }
    first_split[r + 1] = first_split[r] + num_splits(length);
    positions += length;
  }
  const int64_t blocks = (heads + MAX_HEADS - 1) / MAX_HEADS;
  const int64_t heads_block = (heads + blocks - 1) / blocks;
  const int64_t padded = round_up(width, MAX_CHUNK), values = round_up(value_width, MAX_CHUNK);
  const int64_t partial_size = round_up(heads_block * (2 + values), 16);
  const int64_t scratch_size = (heads_block + POSITIONS) * padded + 2 * values;
  const int team = team_size(threads, positions * heads * (width + value_width));
  // As many rows at once as have room, and never less than one.
  int64_t most = PARTIALS / (blocks * partial_size);
  most = most < MAX_SPLITS ? MAX_SPLITS : most;
  if (!fault && first_split[rows] < most) most = first_split[rows];
  const int64_t used = most * blocks * partial_size;
  float* memory = nullptr;
  const size_t bytes = size_t(used + team * scratch_size) * sizeof(float) + 64;
  if (!fault && posix_memalign(reinterpret_cast<void**>(&memory), 64, bytes)) fault = 1;
  for (int64_t first = 0, last = 0; first < rows && !fault; first = last) {
    while (last < rows && first_split[last + 1] - first_split[first] <= most) ++last;
    int64_t next_item[3] = {0, 0, 0};
    const Attention problem = {
        q, cache, page_table, row_sequence, row_length, out, heads, width, value_width, page_size,
        pages, scaling, first, last, first_split, heads_block, memory, partial_size,
        memory + used, scratch_size, next_item};
    run(ATTENTION[isa][format], problem, team);
  }
  std::free(memory);
  std::free(first_split);
  return fault;
}
}
