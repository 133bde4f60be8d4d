// The selective scan's forward.
#pragma once

#include "selective_scan.h"

#include <span>

namespace packc {

struct ForwardOutputs {
  Tensor out; // (B, L, D)
  Tensor final_state; // (documents, D, N), or (0, D, N) where it is not wanted
  Tensor chunk_states; // see kept_state
};

class Forward {
 public:
  Forward(const Problem& p, const ForwardOutputs& outputs)
      : p_(p), outputs_(outputs), in_(p), result_(kSelectiveScanChunk * kChannels) {}

  void run(const Group& group, std::span<const ChannelBlock> blocks) {
    std::vector<Carried> carried;
    for (const ChannelBlock& block : blocks)
      carried.push_back({block, scaled_A(p_, block), States(p_.N)});
    for (const Piece& piece : group) {
      int64_t g = -1;
      for (const Carried& each : carried) {
        if (g != each.block.g)
          in_.load_BC(piece, g = each.block.g);
        in_.load_piece(piece, each.block, [](int64_t, int64_t, Vec) {});
        skip_connection(piece);
        for (int64_t v = 0; v < in_.block.vectors(); ++v)
          for (int64_t n = 0; n < in_.states; n += kStates)
            scan(piece, each, v, n);
        gate_and_store(piece);
      }
    }
  }

 private:
  // What a block of channels takes from piece to piece.
  struct Carried {
    ChannelBlock block;
    States A, h;
  };

  void skip_connection(const Piece& piece) {
    for (int64_t v = 0; v < in_.block.vectors(); ++v) {
      const Vec D = in_.parameter(p_.D, v);
      for (int64_t t = 0; t < piece.count; ++t)
        (p_.D ? D * Vec::loadu(in_.u.at(v, t)) : D).store(y_.at(v, t));
    }
  }

  void scan(const Piece& piece, const Carried& carried, int64_t v, int64_t n) {
    Registers h, A;
    for (int64_t i = 0; i < kStates; ++i) {
      h[i] = Vec::loadu(carried.h.at(v, n + i));
      A[i] = Vec::loadu(carried.A.at(v, n + i));
    }
    for (const Run& run : piece.runs) {
      if (run.starts)
        in_.begin_document(run.document, v, n, h);
      if (run.begin == 0 && piece.begins_chunk())
        keep_chunk_state(piece, v, n, h);
      scan_tokens(run, v, n, A, h);
      if (run.ends && outputs_.final_state.size(0))
        end_document(run.document, v, n, h);
    }
    for (int64_t i = 0; i < kStates; ++i)
      h[i].store(carried.h.at(v, n + i));
  }

  void scan_tokens(const Run& run, int64_t v, int64_t n, const Registers& A, Registers& states) {
    const float* delta = in_.delta.at(v, 0);
    const float* x = in_.x.at(v, 0);
    const float* B = in_.B.data() + n;
    const float* C = in_.C.data() + n;
    float* out = y_.at(v, 0);
    Registers h = states;
    for (int64_t t = run.begin; t < run.end; ++t) {
      const Vec delta_t = Vec::loadu(delta + t * kVec), x_t = Vec::loadu(x + t * kVec);
      Vec y = Vec::loadu(out + t * kVec);
#pragma GCC unroll 8
      for (int64_t i = 0; i < kStates; ++i) {
        h[i] = at::vec::fmadd(exp2(delta_t * A[i]), h[i], x_t * Vec(B[t * in_.states + i]));
        y = at::vec::fmadd(h[i], Vec(C[t * in_.states + i]), y);
      }
      y.store(out + t * kVec);
    }
    states = h;
  }

  void keep_chunk_state(const Piece& piece, int64_t v, int64_t n, const Registers& h) {
    float* kept = outputs_.chunk_states.mutable_data_ptr<float>();
    for (int64_t i = 0; i < kStates && n + i < p_.N; ++i)
      h[i].store(kept + kept_state(p_, piece, n + i, in_.block.first + v * kVec), in_.block.lanes(v));
  }

  void end_document(int64_t document, int64_t v, int64_t n, const Registers& h) {
    float* matrix = outputs_.final_state.mutable_data_ptr<float>() +
        (document * p_.channels + in_.block.first + v * kVec) * p_.N;
    for (int64_t i = 0; i < kStates; ++i)
      scatter_state(h[i], matrix, p_.N, n + i, in_.block.lanes(v));
  }

  void gate_and_store(const Piece& piece) {
    if (p_.z)
      in_.load_rows(*p_.z, piece);
    for (int64_t v = 0; v < in_.block.vectors(); ++v) {
      for (int64_t t = 0; t < piece.count; ++t) {
        Vec y = Vec::loadu(y_.at(v, t));
        if (p_.z) {
          const Vec z = in_.row(v, t);
          y = y * (z * accurate_sigmoid(z));
        }
        y.store(result_.data() + t * kChannels + v * kVec);
      }
    }
    store(
        result_.data(), kChannels, outputs_.out, piece.row, piece.first, in_.block.first, piece.count, in_.block.count);
  }

  const Problem& p_;
  const ForwardOutputs& outputs_;
  Inputs in_;
  Tile y_;
  Scratch result_;
};

} // namespace packc
