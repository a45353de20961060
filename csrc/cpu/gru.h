// The recurrent cell of a model, behind its input layers, and the checks that both need.
#ifndef FASTDREAMER_CPU_GRU_H
#define FASTDREAMER_CPU_GRU_H

#include "fastdreamer.h"

namespace fastdreamer {

constexpr int64_t kMaxBlocks = 64;

inline int64_t input_width(const fd_rssm& model) {
  return model.cell == FD_CELL_GRU ? model.hidden : 3 * model.hidden;
}

inline fd_gru gru_of(const fd_rssm& m) {
  return {m.cell, m.eps, m.deter, input_width(m), m.blocks, m.hidden_weight, m.hidden_bias,
          m.gate_weight, m.gate_bias, m.cell_scale, m.cell_shift};
}

int32_t check_gru(const fd_gru& cell);

}  // namespace fastdreamer

#endif
