// What every library checks before it computes: pointers, and sizes that fit one another.
#ifndef FASTDREAMER_CHECK_H
#define FASTDREAMER_CHECK_H

#include <initializer_list>

#include "gru.h"

namespace fastdreamer {

inline bool any_null(std::initializer_list<const void*> pointers) {
  for (const void* pointer : pointers)
    if (pointer == nullptr) return true;
  return false;
}

inline bool is_compute(int32_t type) { return type == FD_FLOAT32 || type == FD_BFLOAT16; }

inline int32_t check_gru(const fd_gru& cell) {
  const bool blocks = cell.cell == FD_CELL_BLOCK_GRU;
  if (!blocks && (cell.cell != FD_CELL_GRU || cell.blocks != 1)) return FD_ERROR_SIZE;
  if (cell.deter < 1 || cell.inputs < 1 || cell.blocks < 1 || cell.blocks > kMaxBlocks ||
      cell.deter % cell.blocks)
    return FD_ERROR_SIZE;
  if (any_null({cell.gate_weight, cell.scale})) return FD_ERROR_NULL_POINTER;
  if (blocks && any_null({cell.hidden_weight, cell.hidden_bias, cell.gate_bias}))
    return FD_ERROR_NULL_POINTER;
  return FD_OK;
}

inline bool is_layer(const fd_layer& layer, int64_t inputs, int64_t outputs) {
  return layer.inputs == inputs && layer.outputs == outputs && layer.stride >= inputs;
}

inline bool is_share(float mix) { return mix >= 0 && mix <= 1; }

inline int32_t check_model(const fd_rssm& m) {
  if (int32_t error = check_gru(gru_of(m))) return error;
  if (m.stoch < 1 || m.classes < 1 || m.action < 1 || m.head_layers < 1 ||
      m.head_layers > kMaxLayers || !is_share(m.mix))
    return FD_ERROR_SIZE;
  const bool blocks = m.cell == FD_CELL_BLOCK_GRU;
  if (!is_layer(m.in_stoch, m.stoch * m.classes, m.hidden) ||
      !is_layer(m.in_action, m.action, m.hidden) ||
      (blocks && !is_layer(m.in_deter, m.deter, m.hidden)))
    return FD_ERROR_SIZE;
  if (any_null({m.in_stoch.weight, m.in_stoch.scale, m.in_action.weight}))
    return FD_ERROR_NULL_POINTER;
  if (blocks && any_null({m.in_stoch.bias, m.in_action.bias, m.in_action.scale, m.in_deter.weight,
                          m.in_deter.bias, m.in_deter.scale}))
    return FD_ERROR_NULL_POINTER;
  return FD_OK;
}

// Layers whose widths fit one another, all but the last (of `hidden`: also that) with a norm.
inline int32_t check_layers(const fd_layer* layers, int64_t count, int64_t inputs, bool hidden) {
  for (int64_t i = 0; i < count; ++i) {
    if (!is_layer(layers[i], inputs, layers[i].outputs) || layers[i].outputs < 1)
      return FD_ERROR_SIZE;
    if (!layers[i].weight || (!layers[i].scale && (hidden || i + 1 < count)))
      return FD_ERROR_NULL_POINTER;
    inputs = layers[i].outputs;
  }
  return FD_OK;
}

inline int32_t check_posterior(const fd_rssm& model) {
  if (model.head_layers != 2) return FD_ERROR_SIZE;
  if (int32_t error = check_layers(model.head, 2, model.deter, false)) return error;
  if (model.head[0].outputs != model.hidden ||
      model.head[1].outputs != model.stoch * model.classes)
    return FD_ERROR_SIZE;
  return FD_OK;
}

inline int32_t check_observe(const fd_rssm* model, const fd_observe* scan) {
  if (!model || !scan) return FD_ERROR_NULL_POINTER;
  if (int32_t error = check_model(*model)) return error;
  if (scan->B < 0 || scan->T < 0) return FD_ERROR_SIZE;
  if (int32_t error = check_posterior(*model)) return error;
  if (scan->B == 0 || scan->T == 0) return FD_OK;
  const bool hidden = model->cell == FD_CELL_GRU || scan->hidden;
  if (!hidden || any_null({scan->start_deter, scan->start_index, scan->initial_deter,
                           scan->initial_index, scan->action, scan->embedded, scan->is_first,
                           scan->noise, scan->deter, scan->index, scan->logp, scan->inputs,
                           scan->gates, scan->posterior}))
    return FD_ERROR_NULL_POINTER;
  return FD_OK;
}

// The policy of fd_imagine or fd_act.
template <typename Arguments>
inline int32_t check_policy(const fd_rssm& model, const Arguments& args) {
  if (args.policy_layers < 1 || args.policy_layers > kMaxLayers || args.parts < 1 ||
      args.parts > kMaxHeads / 2 || !is_share(args.policy_mix))
    return FD_ERROR_SIZE;
  if (any_null({args.policy, args.part_sizes, args.discrete, args.heads})) return FD_ERROR_NULL_POINTER;
  const int64_t features = model.deter + model.stoch * model.classes;
  if (int32_t error = check_layers(args.policy, args.policy_layers, features, true)) return error;
  const int64_t units = args.policy[args.policy_layers - 1].outputs;
  int64_t total = 0, head = 0;
  for (int64_t i = 0; i < args.parts; total += args.part_sizes[i++])
    for (int64_t n = args.discrete[i] ? 1 : 2; n > 0; --n, ++head) {
      if (args.part_sizes[i] < 1 || !is_layer(args.heads[head], units, args.part_sizes[i]))
        return FD_ERROR_SIZE;
      if (!args.heads[head].weight) return FD_ERROR_NULL_POINTER;
    }
  return total == model.action ? FD_OK : FD_ERROR_SIZE;
}

inline int32_t check_imagine(const fd_rssm* pointer, const fd_imagine* rollout) {
  if (!pointer || !rollout) return FD_ERROR_NULL_POINTER;
  if (int32_t error = check_model(*pointer)) return error;
  const fd_rssm& model = *pointer;
  const fd_imagine& args = *rollout;
  if (args.N < 0 || args.H < 0) return FD_ERROR_SIZE;
  if (int32_t error = check_layers(model.head, model.head_layers, model.deter, false)) return error;
  if (model.head[model.head_layers - 1].outputs != model.stoch * model.classes) return FD_ERROR_SIZE;
  if (int32_t error = check_policy(model, args)) return error;
  if (args.N == 0) return FD_OK;
  if (any_null({args.start_deter, args.start_index, args.action_noise, args.feat, args.index,
                args.action}) ||
      (args.H > 0 && !args.noise) || !args.hidden != !args.kept)
    return FD_ERROR_NULL_POINTER;
  return FD_OK;
}

inline int32_t check_policy_step(const fd_rssm* pointer, const fd_act* step) {
  if (!pointer || !step) return FD_ERROR_NULL_POINTER;
  if (int32_t error = check_model(*pointer)) return error;
  const fd_rssm& model = *pointer;
  const fd_act& args = *step;
  if (args.N < 0 || args.embedding_layers < 1 || args.embedding_layers > kMaxLayers)
    return FD_ERROR_SIZE;
  if (int32_t error = check_posterior(model)) return error;
  if (!args.embedding) return FD_ERROR_NULL_POINTER;
  const int64_t last = args.embedding_layers - 1;
  if (args.embedding[0].inputs < 1 || args.embedding[last].outputs != model.hidden)
    return FD_ERROR_SIZE;
  if (int32_t error =
          check_layers(args.embedding, args.embedding_layers, args.embedding[0].inputs, false))
    return error;
  if (int32_t error = check_policy(model, args)) return error;
  if (args.N > 0 && any_null({args.deter, args.stoch, args.action, args.x, args.is_first,
                              args.initial_deter, args.initial_stoch, args.noise,
                              args.action_noise, args.next_deter, args.next_stoch,
                              args.next_action}))
    return FD_ERROR_NULL_POINTER;
  return FD_OK;
}

// Of what check_observe accepts.
inline int32_t check_observe_grad(
    const fd_rssm& model, const fd_observe& scan, const fd_observe_grad* grad) {
  if (!grad || any_null({grad->dinitial, grad->dnorm})) return FD_ERROR_NULL_POINTER;
  if (scan.B == 0 || scan.T == 0) return FD_OK;
  if (any_null({grad->ddeter, grad->dstoch, grad->dlogp, grad->dinputs, grad->dgates,
                grad->dposterior, grad->dlogits}))
    return FD_ERROR_NULL_POINTER;
  return model.cell == FD_CELL_BLOCK_GRU && !grad->dhidden ? FD_ERROR_NULL_POINTER : FD_OK;
}

}  // namespace fastdreamer

#endif
