// The recurrent cell of a model, behind its input layers.
#ifndef FASTDREAMER_GRU_H
#define FASTDREAMER_GRU_H

#include "fastdreamer.h"

namespace fastdreamer {

constexpr int64_t kMaxBlocks = 64, kMaxLayers = 8, kMaxHeads = 64, kMaxFeatureHeads = 16;

inline int64_t input_width(const fd_rssm& model) {
  return model.cell == FD_CELL_GRU ? model.hidden : 3 * model.hidden;
}

inline fd_gru gru_of(const fd_rssm& m) {
  return {m.cell, m.eps, m.deter, input_width(m), m.blocks, m.hidden_weight, m.hidden_bias,
          m.gate_weight, m.gate_bias, m.cell_scale, m.cell_shift};
}

}  // namespace fastdreamer

#endif
