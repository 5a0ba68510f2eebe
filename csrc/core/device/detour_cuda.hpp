// The way to a GPU's memory over a neighbour's bus: into staging memory there, and from there over the link
// that joins the two.
#pragma once

#include "device/device_cuda.hpp"

namespace pyint8 {

class CudaDetour final : public Detour {
 public:
  // Throws kDriver where the neighbour cannot write to the memory of `to`.
  CudaDetour(const std::shared_ptr<const CudaApi>& api, int neighbour, int to);
  // Waits for its copies, and gives all back: memory, access and context.
  ~CudaDetour() override;
  CudaDetour(const CudaDetour&) = delete;
  CudaDetour& operator=(const CudaDetour&) = delete;

  void stage(const std::byte* slots, std::size_t nbytes) override;
  bool reaches(Address to) const override;
  std::unique_ptr<Event> make_event() override { return copies_.make_event(); }
  void copy(Address to, const std::byte* from, std::size_t nbytes) override;
  void record(Event& event) override { copies_.record(event); }
  void copies_wait_for(const Event& event) override { copies_.wait_for(event); }
  void synchronize() override { copies_.synchronize(); }

 private:
  // Of the neighbour to memory of the other; ended with this, unless somebody else had it before.
  class Access {
   public:
    Access(const CudaContext& neighbour, const CudaContext& to);
    ~Access();
    Access(const Access&) = delete;
    Access& operator=(const Access&) = delete;

   private:
    const CudaContext& neighbour_;
    const CudaContext& to_;
    bool is_ours_ = false;
  };

  std::shared_ptr<CudaContext> neighbour_, to_;
  Access access_;
  CudaCopies copies_;
  const std::byte* slots_ = nullptr;
  CuDevicePtr staging_ = 0;  // a byte for each byte of slots
};

}  // namespace pyint8
