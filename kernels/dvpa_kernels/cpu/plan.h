// From operands to problems: the parts that every instruction set shares are filled in, and scratch
// memory is handed out. Nothing here writes to that memory.
#pragma once

#include "problems.h"

namespace dvpa {

// Memory handed out in order, aligned to cache lines; over none it only counts.
struct Arena {
  char* memory;
  int64_t used = 0;
  template <class U>
  U* take(int64_t count) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(memory) + uintptr_t(used);
    used += round_up(count * int64_t(sizeof(U)), 64);
    return reinterpret_cast<U*>(address);
  }
  void* staged(int64_t rows, int64_t depth) {
    return take<float>(rows * round_up(depth, MAX_CHUNK));
  }
};

// The counters of a call's phases, all zero.
struct Counters {
  int64_t values[64] = {};
  int used = 0;
  int64_t* take(int count) {
    used += count;
    return values + used - count;
  }
};

// A Linear over contiguous operands, but for what the caller changes afterwards.
inline Linear plan_linear(const void* x, const void* weight, const void* bias, void* y,
                          int64_t tokens, int64_t groups, int64_t depth, int64_t columns,
                          int threads, Arena& arena, Counters& counters) {
  // Equal blocks of rows, and smaller ones where there are too few items for the team.
  int64_t blocks = (tokens + LINEAR_ROWS - 1) / LINEAR_ROWS;
  const int64_t panels = groups * (round_up(columns, COLUMNS) / COLUMNS);
  while (panels * blocks < 2 * threads && tokens / blocks >= LINEAR_ROWS / 4) blocks *= 2;
  return {x, weight, bias, y, tokens, groups, depth, columns, groups * depth, depth,
          groups * columns, columns, (tokens + blocks - 1) / blocks,
          arena.staged(tokens * groups, depth), counters.take(2)};
}

// Scratch memory for up to `rows` rows; the caller sets the routing.
inline Experts plan_experts(const void* x, const void* w_gate_up, const void* w_down, void* y,
                            int64_t tokens, int64_t hidden, int64_t width, int64_t experts,
                            int64_t rows, Arena& arena, Counters& counters) {
  Experts p = {};
  p.x = x, p.w_gate_up = w_gate_up, p.w_down = w_down, p.y = y;
  p.tokens = tokens, p.hidden = hidden, p.width = width, p.experts = experts;
  p.used_experts = arena.take<int32_t>(experts);
  p.staged_x = arena.staged(tokens, hidden);
  p.staged_act = arena.staged(rows, width);
  p.packed_y = arena.take<float>(rows * hidden);
  p.next_item = counters.take(4);
  return p;
}

// The experts that have rows.
inline void find_used(Experts& p) {
  p.num_used = 0;
  for (int64_t e = 0; e < p.experts; ++e)
    if (p.expert_offsets[e + 1] > p.expert_offsets[e]) p.used_experts[p.num_used++] = int32_t(e);
}

// What a SwiGLU MLP computes, phase after phase.
struct Mlp {
  Linear gate_up;
  Gate gate;
  Linear down;
};

inline Mlp plan_mlp(const void* x, const void* w_gate_up, const void* w_down, void* y,
                    int64_t tokens, int64_t hidden, int64_t width, int threads, Arena& arena,
                    Counters& counters) {
  void* gate_up = arena.take<float>(tokens * 2 * width);
  void* act = arena.take<float>(tokens * width);
  return {plan_linear(x, w_gate_up, nullptr, gate_up, tokens, 1, hidden, 2 * width, threads, arena,
                      counters),
          {gate_up, act, tokens, width, counters.take(1)},
          plan_linear(act, w_down, nullptr, y, tokens, 1, width, hidden, threads, arena, counters)};
}

// The router's limits: pools, experts and groups by tier, as in Route.
struct RouterTable {
  const int64_t *pool, *top_k, *topk_group;
  const float* factor;
  int64_t tiers, group_size, normalises, softmax, best_of_group, stripes;
};

// Fills all but the outputs.
inline Route plan_route(const void* x, const void* weight, const float* tier_bias,
                        const RouterTable& table, const int64_t* tiers, int64_t tokens,
                        int64_t hidden, int64_t experts, Arena& arena, Counters& counters) {
  int64_t slots = 0, pool = 0, highest = -1;
  for (int64_t t = 0; t < tokens; ++t) highest = tiers[t] > highest ? tiers[t] : highest;
  for (int64_t i = 0; i <= highest; ++i) {
    slots = table.top_k[i] > slots ? table.top_k[i] : slots;
    pool = table.pool[i] > pool ? table.pool[i] : pool;
  }
  const int64_t groups = table.stripes ? table.stripes : experts / table.group_size;
  const int64_t items = tokens * (experts + groups);
  return {x, weight, tier_bias, tiers, table.pool, table.top_k, table.topk_group, table.factor,
          tokens, hidden, experts, groups, table.group_size, table.stripes, table.best_of_group,
          slots, pool, table.normalises != 0, table.softmax != 0, nullptr, nullptr, arena.take<float>(tokens * experts), arena.take<float>(items),
          arena.take<int32_t>(items), arena.staged(tokens, hidden), counters.take(3)};
}

// Whether every tier is one of `count`, or negative.
inline bool are_tiers(const int64_t* tiers, int64_t tokens, int64_t count) {
  for (int64_t t = 0; t < tokens; ++t)
    if (tiers[t] >= count) return false;
  return true;
}

// Whether every slot is one of `count`.
inline bool are_slots(const int64_t* slots, int64_t tokens, int64_t count) {
  for (int64_t t = 0; t < tokens; ++t)
    if (slots[t] < 0 || slots[t] >= count) return false;
  return true;
}

// Partial results of attention that are kept at once, in floats.
constexpr int64_t PARTIALS = 1 << 22;

enum Fault { NONE, NO_MEMORY, BAD_SEQUENCE, BAD_LENGTH, BAD_PAGE, BAD_SLOT, BAD_TIER };

// What attention reads, in positions and in splits of the rows.
struct Extent {
  int64_t positions = 0, splits = 0;
};

// The first value out of range, among those that the rows need.
inline Fault check_rows(const Attention& p, int64_t sequences, int64_t cache_pages,
                        Extent* extent) {
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t sequence = p.row_sequence[r], length = p.row_length[r];
    if (sequence < 0 || sequence >= sequences) return BAD_SEQUENCE;
    if (length < 0 || length > p.pages * p.page_size) return BAD_LENGTH;
    for (int64_t i = 0; i * p.page_size < length; ++i) {
      const int64_t page = p.page_table[sequence * p.pages + i];
      if (page < 0 || page >= cache_pages) return BAD_PAGE;
    }
    extent->positions += length;
    extent->splits += num_splits(length);
  }
  return NONE;
}

// Fills all that follows from the operands.
inline void plan_attention(Attention& p, Extent extent, int team, Arena& arena,
                           Counters& counters) {
  const int64_t blocks = (p.heads + MAX_HEADS - 1) / MAX_HEADS;
  p.heads_block = (p.heads + blocks - 1) / blocks;
  const int64_t padded = round_up(p.width, MAX_CHUNK), values = round_up(p.value_width, MAX_CHUNK);
  p.partial_size = round_up(p.heads_block * (2 + values), 16);
  p.scratch_size = (p.heads_block + POSITIONS) * padded + 2 * values;
  // As many rows at once as have room, and never less than one.
  p.splits_at_once = PARTIALS / (blocks * p.partial_size);
  if (p.splits_at_once < MAX_SPLITS) p.splits_at_once = MAX_SPLITS;
  if (p.splits_at_once > extent.splits) p.splits_at_once = extent.splits;
  p.first_row = p.last_row = 0;
  p.first_split = arena.take<int64_t>(p.rows + 1);
  p.partials = arena.take<float>(p.splits_at_once * blocks * p.partial_size);
  p.scratch = arena.take<float>(team * p.scratch_size);
  p.next_item = counters.take(3);
}

// Goes on to the next rows that have room; none are left where there are none.
inline void next_rows(Attention& p) {
  p.first_row = p.last_row;
  while (p.last_row < p.rows &&
         p.first_split[p.last_row + 1] - p.first_split[p.first_row] <= p.splits_at_once)
    ++p.last_row;
  for (int i = 0; i < 3; ++i) p.next_item[i] = 0;
}

// Once there is memory.
inline void count_splits(const Attention& p) {
  p.first_split[0] = 0;
  for (int64_t r = 0; r < p.rows; ++r)
    p.first_split[r + 1] = p.first_split[r] + num_splits(p.row_length[r]);
}

// Rows of a routing table [tokens, slots] in one counting sort, stable in slot order; an index of
// `experts` is an empty slot. Fills order and token_index by row, expert_offsets [experts + 1],
// token_rows by token and token_offsets [tokens + 1]; `next` is scratch, [experts + 1]. Returns the
// number of rows, or -1 for an index out of range.
inline int64_t sort_rows(int64_t tokens, int64_t slots, int64_t experts, const int64_t* index,
                         int64_t* order, int64_t* token_index, int32_t* expert_offsets,
                         int32_t* token_rows, int32_t* token_offsets, int32_t* next) {
  std::memset(next, 0, size_t(experts + 1) * sizeof(int32_t));
  for (int64_t s = 0; s < tokens * slots; ++s) {
    if (index[s] < 0 || index[s] > experts) return -1;
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
  return rows;
}

}  // namespace dvpa
