// What each kernel is asked to do: the operands of one call, for every instruction set alike.
#pragma once

#include "scalar.h"

namespace dvpa {

constexpr int MAX_CHUNK = 32;
constexpr int64_t COLUMNS = 32;  // outputs in one item of work; a multiple of every CHUNK
// Terms of an output that are summed in one vector; the sums of such blocks are added in order.
constexpr int64_t DEPTH_BLOCK = 1024;
constexpr int64_t LINEAR_ROWS = 128;  // at most, in one item of work of a dense layer

INLINE int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// The next item of a phase: every item is taken by exactly one thread.
INLINE int64_t take(int64_t* next_item) {
  return __atomic_fetch_add(next_item, 1, __ATOMIC_RELAXED);
}

// The expert MLP. T tokens, D hidden, F expert width, E experts, R rows.
struct Experts {
  const void* x;               // [T, D]
  const void* w_gate_up;       // [E, 2F, D]
  const void* w_down;          // [E, D, F]
  const float* weight;         // [R]
  const int64_t* token_index;  // [R]
  const int32_t* expert_offsets;  // [E + 1]
  const int32_t* token_rows;      // [R]
  const int32_t* token_offsets;   // [T + 1]
  void* y;                        // [T, D]
  int64_t tokens, hidden, width, experts;

  int32_t* used_experts;  // those with rows
  int64_t num_used;
  void* staged_x;    // [T, padded D], four bytes an element at most
  void* staged_act;  // [R, padded F], likewise
  float* packed_y;   // [R, D]
  int64_t* next_item;  // one counter for each of the four phases
};

// y[t, g] = x[t, g] . weight[g] + bias[g]. T tokens, G groups, K inputs, N outputs.
struct Linear {
  const void* x;       // [T, G, K]
  const void* weight;  // [G, N, K]
  const void* bias;    // [G, N] or null
  void* y;             // [T, G, N]
  int64_t tokens, groups, depth, columns;
  int64_t x_token, x_group, y_token, y_group;  // strides in elements

  int64_t block_rows;  // tokens in one item of work
  void* staged_x;      // [T, G, padded K], four bytes an element at most
  int64_t* next_item;  // one counter for each of the two phases
};

// y[t] = weight * x[t] / root mean square of x[t]. T tokens, D size.
struct Norm {
  void* x;             // [T, D], x_token elements from one to the next
  const void* added;   // [T, D] or null: is added to x first, in place
  const void* weight;  // [D]
  void* y;             // [T, D]
  int64_t tokens, size, x_token;
  float epsilon;
  int64_t* next_item;
};

// x += first, then x += second, each rounded.
struct Sum {
  void* x;
  const void *first, *second;  // second may be null
  int64_t size;
  int64_t* next_item;
};

// y = silu(gate) * up, each factor rounded. T tokens, F width.
struct Gate {
  const void* gate_up;  // [T, 2F], gate first
  void* y;              // [T, F]
  int64_t tokens, width;
  int64_t* next_item;
};

// Rotates queries and writes cache rows. T tokens, H heads, N no-rope dims, P rope dims, C latent.
struct Rows {
  const void* query;        // [T, H, N + P], query_token elements from one token to the next
  const void* row;          // [T, C + P], row_token elements from one to the next
  const void* norm;         // [C]
  const void *cos, *sin;    // [T, P]
  const int64_t* slots;     // [T], rows of the cache
  void* cache;              // [slots, C + P]
  void* out;                // [T, H, out_head]: the rotated part is at out_rope
  int64_t tokens, heads, nope, rope, latent, query_token, row_token, out_head, out_rope;
  float epsilon;
  bool interleaved, copies_nope;  // the rest of a query, to the start of its place in `out`
  int64_t* next_item;
};

// Chooses experts. T tokens, D hidden, E experts, K slots; the limits are by tier.
struct Route {
  const void* x;           // [T, D]
  const void* weight;      // [E, D]
  const float* tier_bias;  // [tiers, E]
  const int64_t* tiers;    // [T]; negative: no experts
  const int64_t *pool, *top_k, *topk_group;
  const float* factor;
  int64_t tokens, hidden, experts, groups, group_size;
  int64_t stripes;        // groups of striped pools; 0: groups are contiguous
  int64_t best_of_group;  // a group's score: the sum of so many of its best choices
  int64_t slots;
  int64_t pool_present;  // the largest pool of these tokens' tiers
  bool normalises, softmax;
  int64_t* index;  // [T, K]; E: an empty slot
  float* score;    // [T, K]

  float* scores;   // [T, E], of the present pool
  float* choice;   // [T, E + groups]
  int32_t* items;  // [T, E + groups]
  void* staged_x;  // [T, padded D], four bytes an element at most
  int64_t* next_item;  // one counter for each of the three phases
};

// The rows of an expert in training, all fp32. R rows, F width, D size; token_index is [R].
// out[r] = source[token_index[r]].
struct Gather {
  const float* source;  // [T, D]
  const int64_t* token_index;
  float* out;  // [R, D]
  int64_t rows, size;
  int64_t* next_item;
};

// sums[token_index[r]] += weight[r] * values[r], in the order of the rows.
struct AddRows {
  const float* values;  // [R, D]
  const int64_t* token_index;
  const float* weight;  // [R], or null for ones
  float* sums;          // [T, D]
  int64_t rows, size;
  int64_t block;  // columns in one item of work
  int64_t* next_item;
};

// What Gate and the product after it send back, from d_act = grad . w_down.
struct Slope {
  const float* gate_up;  // [R, 2F]
  const float* d_act;    // [R, F], before the row's weight
  const float* weight;   // [R]
  float* act;            // [R, F]: weight * silu(gate) * up
  float* d_gate_up;      // [R, 2F]
  float* d_weight;       // [R]
  int64_t rows, width;
  int64_t* next_item;
};

constexpr int64_t POSITIONS = 32;  // in one block of the online softmax
constexpr int MAX_HEADS = 24;      // that share a packed cache row
constexpr int64_t MIN_SPLIT = 128;  // positions
constexpr int64_t MAX_SPLITS = 16;  // of one row

// Positions in each split of a context of this length, and their number: of nothing else.
INLINE int64_t split_size(int64_t length) {
  return (length + MIN_SPLIT * MAX_SPLITS - 1) / (MIN_SPLIT * MAX_SPLITS) * MIN_SPLIT;
}
INLINE int64_t num_splits(int64_t length) {
  return length ? (length + split_size(length) - 1) / split_size(length) : 0;
}

// Absorbed latent attention. R rows, H heads, W cache row, C values, S sequences, M pages.
struct Attention {
  const void* q;                // [R, H, W]
  const void* cache;            // [pages, page_size, W]
  const int32_t* page_table;    // [S, M]
  const int32_t* row_sequence;  // [R]
  const int32_t* row_length;    // [R]
  void* out;                    // [R, H, C]
  int64_t heads, width, value_width, page_size, pages;
  float scaling;

  int64_t rows, splits_at_once;
  int64_t first_row, last_row;  // what this call of the worker does
  int64_t* first_split;         // [R + 1], splits of all rows before
  int64_t heads_block;          // heads in one item of work
  float* partials;              // one for each item
  int64_t partial_size;
  float* scratch;  // one for each thread
  int64_t scratch_size;
  int64_t* next_item;  // one counter for the scratch, then one for each of the two phases
};

}  // namespace dvpa
