// The CUDA library's scans on threads, for a run under ThreadSanitizer: both cells, forward,
// backward and rollout. Takes blocks and warps of each; what it computes is tested elsewhere.
#include <stdio.h>
#include <stdlib.h>

#include "emulated.cpp"

namespace {

constexpr int64_t B = 18, T = 3, D = 24, S = 3, K = 4, A = 3, U = 9, G = 2, H = 2;

std::vector<std::vector<float>> memory;

float* make(int64_t count) {  // small and different from one another
  memory.emplace_back(count);
  for (int64_t i = 0; i < count; ++i) memory.back()[i] = static_cast<float>(i * 37 % 101 - 50) / 200;
  return memory.back().data();
}

fd_layer layer(int64_t inputs, int64_t outputs, bool norm = true) {
  return {make(outputs * inputs), make(outputs), norm ? make(outputs) : nullptr, nullptr,
          inputs, outputs, inputs};
}

fd_rssm make_model(int32_t cell) {
  const bool blocks = cell == FD_CELL_BLOCK_GRU;
  const int64_t groups = blocks ? G : 1, width = D / groups;
  fd_rssm m{cell, 1e-3f, 0.01f, D, S, K, A, U, groups, layer(S * K, U), layer(A, U), layer(D, U),
            make(groups * (width + 3 * U) * width), make(D),
            make(blocks ? D * 3 * width : 3 * D * (D + U)), make(3 * D), make(3 * D),
            blocks ? nullptr : make(3 * D), {layer(D, U), layer(U, S * K, false)}, 2};
  return m;
}

template <typename Call>
void run(const char* name, const Call& call) {
  for (int32_t compute : {FD_FLOAT32, FD_BFLOAT16}) {
    fd_launch launch{compute, nullptr, 0, nullptr};
    int32_t error = call(&launch);
    std::vector<double> workspace(launch.workspace_bytes / 8 + 2);
    launch.workspace = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 15) / 16 * 16);
    if (!error) error = call(&launch);
    printf("%s in %s: error %d\n", name, compute == FD_FLOAT32 ? "float32" : "bfloat16", error);
    if (error) exit(1);
  }
}

void run_cell(int32_t cell) {
  const fd_rssm model = make_model(cell);
  std::vector<int32_t> start(B * S, 1), index(B * (T + H) * S);
  std::vector<uint8_t> first(B * T);
  for (size_t i = 0; i < first.size(); ++i) first[i] = i % 5 == 0;
  const fd_observe scan{B, T, make(B * D), start.data(), make(D), start.data(), make(B * T * A),
                        make(B * T * U), first.data(), make(B * T * S * K), make(B * T * D),
                        index.data(), make(B * T * S * K), make(B * T * 3 * U), make(B * T * D),
                        make(B * T * 3 * D), make(B * T * U)};
  run("observe", [&](fd_launch* launch) { return fd_rssm_observe(&model, &scan, launch); });
  const fd_observe_grad grad{make(B * T * D), make(B * T * S * K), make(B * T * S * K),
                             make(B * T * 3 * U), make(B * T * D), make(B * T * 3 * D),
                             make(B * T * U), make(B * T * S * K), make(D),
                             make(2 * (3 * U + 3 * D + U))};
  run("backward", [&](fd_launch* launch) {
    return fd_rssm_observe_backward(&model, &scan, &grad, launch);
  });
  const fd_layer policy[2] = {layer(D + S * K, U), layer(U, U)};
  const fd_layer heads[3] = {layer(U, 2, false), layer(U, 1, false), layer(U, 1, false)};
  const int64_t sizes[2] = {2, 1};
  const uint8_t discrete[2] = {1, 0};
  const fd_imagine rollout{B, H, make(B * D), start.data(), make(B * H * S * K),
                           make(B * (H + 1) * A), make(B * (H + 1) * (D + S * K)), index.data(),
                           make(B * (H + 1) * A), nullptr, nullptr, policy, 2, 1, 0.01f, 2, sizes,
                           discrete, heads};
  run("imagine", [&](fd_launch* launch) { return fd_rssm_imagine(&model, &rollout, launch); });
}

}  // namespace

int main(int, char** arguments) {
  fd_emulate(atoi(arguments[1]), atoi(arguments[2]), 1 << 18, 0, 1 << 28);
  for (int32_t cell : {FD_CELL_GRU, FD_CELL_BLOCK_GRU}) run_cell(cell);
}
