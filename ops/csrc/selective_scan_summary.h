// The selective scan's states alone: what a segment leaves behind, forwards, and what its results owe to the state that
// enters, backwards. Of one document, which is all there is:
//
//   h[t] = a[t] h[t-1] + x[t] B[t],   dh[t-1] = a[t] (dh[t] + dy[t] C[t]),   a = exp(delta A), x = delta u
#pragma once

#include "selective_scan.h"

#include <span>

namespace packc {

struct StateOutputs {
  Tensor steps; // (1, D), the sum of delta: forwards
  Tensor state; // (1, D, N)
};

// Backwards, the problem has dout for u and C for B.
template <bool backwards>
class StateWalk {
 public:
  StateWalk(const Problem& p, const StateOutputs& outputs) : p_(p), outputs_(outputs), in_(p) {}

  void run(const Group& group, std::span<const ChannelBlock> blocks) {
    std::vector<Carried> carried;
    for (const ChannelBlock& block : blocks)
      carried.push_back({block, scaled_A(p_, block), States(p_.N), Zeros(kChannels)});
    const int64_t count = static_cast<int64_t>(carried.size()), steps = count * static_cast<int64_t>(group.size());
    const auto piece_at = [&](int64_t step) -> const Piece& {
      return group[(backwards ? steps - 1 - step : step) / count];
    };
    int64_t g = -1;
    for (int64_t step = 0; step < steps; ++step) {
      const Piece& piece = piece_at(step);
      const Carried& each = carried[step % count];
      if (step % count == 0 || g != each.block.g)
        in_.load_B(piece, g = each.block.g);
      in_.load_piece(piece, each.block, [](int64_t, int64_t, Vec) {});
      if (backwards)
        gate(piece);
      const int64_t next = std::min(step + 1, steps - 1);
      const int64_t walks = in_.block.vectors() * in_.states / kStates;
      for (int64_t v = 0, walked = 0; v < in_.block.vectors(); ++v) {
        if (!backwards)
          count_steps(piece, each, v);
        for (int64_t n = 0; n < in_.states; n += kStates) {
          prefetch(piece_at(next), carried[next % count].block, walked++, walks);
          walk(piece, each, v, n);
        }
      }
    }
    for (const Carried& each : carried)
      store(each);
  }

 private:
  // What a block of channels takes from piece to piece.
  struct Carried {
    ChannelBlock block;
    States A, h;
    Zeros steps;
  };

  // Asks for one of so many shares of what a later step will load: its rows lie too far apart for the processor to
  // foresee, and asked for all at once they would have to wait for each other.
  void prefetch(const Piece& piece, const ChannelBlock& block, int64_t share, int64_t shares) const {
    const int64_t begin = piece.count * share / shares, end = piece.count * (share + 1) / shares;
    for (const Tensor* x : {&p_.u, &p_.delta, p_.z ? &*p_.z : nullptr}) {
      if (x == nullptr || x->stride(2) != 1)
        continue;
      const int64_t bytes = static_cast<int64_t>(x->element_size());
      const char* row = static_cast<const char*>(x->const_data_ptr()) + (piece.row * x->stride(0) + block.first) * bytes;
      for (int64_t t = piece.first + begin; t < piece.first + end; ++t)
        for (int64_t at = 0; at < block.count * bytes; at += 64)
          __builtin_prefetch(row + t * x->stride(1) * bytes + at);
    }
  }

  // u is dout, and becomes dy.
  void gate(const Piece& piece) {
    if (!p_.z)
      return;
    in_.load_rows(*p_.z, piece);
    for (int64_t v = 0; v < in_.block.vectors(); ++v)
      for (int64_t t = 0; t < piece.count; ++t) {
        const Vec z = in_.row(v, t);
        (Vec::loadu(in_.u.at(v, t)) * z * accurate_sigmoid(z)).store(in_.u.at(v, t));
      }
  }

  void count_steps(const Piece& piece, const Carried& carried, int64_t v) {
    Vec sum(0.f);
    for (int64_t t = 0; t < piece.count; ++t)
      sum = sum + Vec::loadu(in_.delta.at(v, t));
    float* steps = carried.steps.data() + v * kVec;
    (Vec::loadu(steps) + sum).store(steps);
  }

  void walk(const Piece& piece, const Carried& carried, int64_t v, int64_t n) {
    Registers h, A;
    for (int64_t i = 0; i < kStates; ++i) {
      h[i] = Vec::loadu(carried.h.at(v, n + i));
      A[i] = Vec::loadu(carried.A.at(v, n + i));
    }
    const float *delta = in_.delta.at(v, 0), *x = (backwards ? in_.u : in_.x).at(v, 0), *B = in_.B.data() + n;
    for (int64_t step = 0; step < piece.count; ++step) {
      const int64_t t = backwards ? piece.count - 1 - step : step;
      const Vec delta_t = Vec::loadu(delta + t * kVec), x_t = Vec::loadu(x + t * kVec);
#pragma GCC unroll 8
      for (int64_t i = 0; i < kStates; ++i) {
        const Vec decay = exp2(delta_t * A[i]), B_t(B[t * in_.states + i]);
        if constexpr (backwards)
          h[i] = decay * at::vec::fmadd(x_t, B_t, h[i]);
        else
          h[i] = at::vec::fmadd(decay, h[i], x_t * B_t);
      }
    }
    for (int64_t i = 0; i < kStates; ++i)
      h[i].store(carried.h.at(v, n + i));
  }

  void store(const Carried& carried) {
    for (int64_t v = 0; v < carried.block.vectors(); ++v) {
      const int64_t channel = carried.block.first + v * kVec, lanes = carried.block.lanes(v);
      float* matrix = outputs_.state.mutable_data_ptr<float>() + channel * p_.N;
      for (int64_t n = 0; n < p_.N; ++n)
        scatter_state(Vec::loadu(carried.h.at(v, n)), matrix, p_.N, n, lanes);
      if (!backwards)
        Vec::loadu(carried.steps.data() + v * kVec).store(outputs_.steps.mutable_data_ptr<float>() + channel, lanes);
    }
  }

  const Problem& p_;
  const StateOutputs& outputs_;
  Inputs in_;
};

} // namespace packc
