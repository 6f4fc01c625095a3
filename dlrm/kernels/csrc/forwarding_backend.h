// A process group's backend that hands every collective on to another backend. A subclass overrides those that it does
// itself.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <chrono>
#include <utility>
#include <vector>

namespace dlrm {

class ForwardingBackend : public c10d::Backend {
 public:
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;
  using Tensors = std::vector<at::Tensor>;
  using TensorLists = std::vector<Tensors>;

  explicit ForwardingBackend(c10::intrusive_ptr<c10d::Backend> plain)
      : Backend(plain->getRank(), plain->getSize()), plain_(std::move(plain)) {}

  c10::intrusive_ptr<Options> getBackendOptions() override { return plain_->getBackendOptions(); }
  void setTimeout(std::chrono::milliseconds timeout) override { plain_->setTimeout(timeout); }

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override {
    return plain_->broadcast(tensors, options);
  }

  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    return plain_->allreduce(tensors, options);
  }
  WorkPtr allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override {
    return plain_->allreduce_coalesced(tensors, options);
  }
  WorkPtr allreduce_sparse(Tensors& tensors, const c10d::AllreduceOptions& options) override {
    return plain_->allreduce_sparse(tensors, options);
  }
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override {
    return plain_->reduce(tensors, options);
  }

  WorkPtr allgather(TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    return plain_->allgather(outputs, inputs, options);
  }
  WorkPtr _allgather_base(at::Tensor& output, at::Tensor& input, const c10d::AllgatherOptions& options) override {
    return plain_->_allgather_base(output, input, options);
  }
  WorkPtr allgather_coalesced(TensorLists& outputs, Tensors& inputs, const c10d::AllgatherOptions& options) override {
    return plain_->allgather_coalesced(outputs, inputs, options);
  }
  WorkPtr allgather_into_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::AllgatherOptions& options) override {
    return plain_->allgather_into_tensor_coalesced(outputs, inputs, options);
  }
  WorkPtr gather(TensorLists& outputs, Tensors& inputs, const c10d::GatherOptions& options) override {
    return plain_->gather(outputs, inputs, options);
  }
  WorkPtr scatter(Tensors& outputs, TensorLists& inputs, const c10d::ScatterOptions& options) override {
    return plain_->scatter(outputs, inputs, options);
  }

  WorkPtr reduce_scatter(Tensors& outputs, TensorLists& inputs, const c10d::ReduceScatterOptions& options) override {
    return plain_->reduce_scatter(outputs, inputs, options);
  }
  WorkPtr _reduce_scatter_base(at::Tensor& output, at::Tensor& input,
                               const c10d::ReduceScatterOptions& options) override {
    return plain_->_reduce_scatter_base(output, input, options);
  }
  WorkPtr reduce_scatter_tensor_coalesced(Tensors& outputs, Tensors& inputs,
                                          const c10d::ReduceScatterOptions& options) override {
    return plain_->reduce_scatter_tensor_coalesced(outputs, inputs, options);
  }

  WorkPtr alltoall_base(at::Tensor& output, at::Tensor& input, std::vector<int64_t>& output_sizes,
                        std::vector<int64_t>& input_sizes, const c10d::AllToAllOptions& options) override {
    return plain_->alltoall_base(output, input, output_sizes, input_sizes, options);
  }
  WorkPtr alltoall(Tensors& outputs, Tensors& inputs, const c10d::AllToAllOptions& options) override {
    return plain_->alltoall(outputs, inputs, options);
  }

  WorkPtr send(Tensors& tensors, int rank, int tag) override { return plain_->send(tensors, rank, tag); }
  WorkPtr recv(Tensors& tensors, int rank, int tag) override { return plain_->recv(tensors, rank, tag); }
  WorkPtr recvAnysource(Tensors& tensors, int tag) override { return plain_->recvAnysource(tensors, tag); }

  WorkPtr barrier(const c10d::BarrierOptions& options) override { return plain_->barrier(options); }
  void monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) override {
    plain_->monitoredBarrier(options, wait_all_ranks);
  }

  void setSequenceNumberForGroup() override { plain_->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return plain_->getSequenceNumberForGroup(); }

 protected:
  const c10::intrusive_ptr<c10d::Backend> plain_;
};

}  // namespace dlrm
