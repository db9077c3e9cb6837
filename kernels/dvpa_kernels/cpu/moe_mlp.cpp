// The C interface of the CPU expert kernel, and the choice of instruction set at run time.
//
// The same code (experts.inc) is compiled once for each instruction set, between target options, so
// that one library serves every machine of an architecture. Nothing here needs the C++ runtime
// library or PyTorch's headers; OpenMP's symbols come from the runtime PyTorch has loaded.

#include <cstdlib>

#include "scalar.h"

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

// The next item of a phase: every item is taken by exactly one thread.
INLINE int64_t take(const Problem& p, int phase) {
  return __atomic_fetch_add(p.next_item + phase, 1, __ATOMIC_RELAXED);
}

namespace plain {
#include "vector_plain.inc"
#include "experts.inc"
}  // namespace plain

#if defined(__x86_64__)

TARGET_BEGIN("avx2,fma,f16c")
namespace avx2 {
#include "vector_avx2.inc"
#include "experts.inc"
}  // namespace avx2
TARGET_END

TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512 {
#include "vector_avx512.inc"
#include "experts.inc"
}  // namespace avx512
TARGET_END

#define DVPA_BF16_DOT
TARGET_BEGIN("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace avx512_bf16 {
#include "vector_avx512.inc"
#include "experts.inc"
}  // namespace avx512_bf16
TARGET_END

#endif

namespace {

using Worker = void (*)(const Problem&);

// By instruction set (plain, avx2, avx512, avx512_bf16), then by number format (fp32, bf16, fp16).
const Worker WORKERS[][3] = {
    {plain::work<float>, plain::work<BF16>, plain::work<F16>},
#if defined(__x86_64__)
    {avx2::work<float>, avx2::work<BF16>, avx2::work<F16>},
    {avx512::work<float>, avx512::work<BF16>, avx512::work<F16>},
    {avx512::work<float>, avx512_bf16::work<BF16>, avx512::work<F16>},
#endif
};

// A team costs some microseconds; below this many multiplications for each thread it does not pay.
constexpr int64_t WORK_PER_THREAD = 1 << 17;

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

// y = the experts' weighted sum; see Problem for the operands, which the caller has checked.
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
  const Problem problem = {
      x, w_gate_up, w_down, weight, token_index, expert_offsets, token_rows, token_offsets, y,
      tokens, hidden, width, experts, used, num_used, memory, memory + x_bytes,
      reinterpret_cast<float*>(memory + x_bytes + act_bytes), next_item};

  const Worker worker = WORKERS[isa][format];
  const int64_t useful = 1 + 3 * rows * hidden * width / WORK_PER_THREAD;
  const int team = threads < useful ? threads : int(useful);
#pragma omp parallel num_threads(team) if (team > 1)
  worker(problem);
  std::free(memory);
  return 0;
}
}
