#include "device/detour_cuda.hpp"

#include <string>

#include "error.hpp"

namespace pyint8 {

CudaDetour::Access::Access(const CudaContext& neighbour, const CudaContext& to)
    : neighbour_(neighbour), to_(to) {
  const CudaApi& api = neighbour_.api();
  int can = 0;
  api.check(api.device_can_access_peer(&can, neighbour_.device(), to_.device()), "cuDeviceCanAccessPeer");
  if (can == 0) {
    throw Error(ErrorCode::kDriver, "GPU " + std::to_string(neighbour_.device()) +
                                        " cannot write to the memory of GPU " + std::to_string(to_.device()));
  }
  const CudaContext::Scope scope(neighbour_);
  const CuResult result = api.context_enable_peer_access(to_.handle(), 0);
  if (result != kPeerAccessAlreadyEnabled) api.check(result, "cuCtxEnablePeerAccess");
  is_ours_ = result == 0;
}

CudaDetour::Access::~Access() {
  if (!is_ours_) return;
  const CudaContext::Scope scope(neighbour_, std::nothrow);
  // What ends is the current context's access, which may be somebody else's.
  if (scope.is_current()) neighbour_.api().context_disable_peer_access(to_.handle());
}

CudaDetour::CudaDetour(const std::shared_ptr<const CudaApi>& api, int neighbour, int to)
    : neighbour_(std::make_shared<CudaContext>(api, neighbour)),
      to_(std::make_shared<CudaContext>(api, to)),
      access_(*neighbour_, *to_),
      copies_(neighbour_) {}

CudaDetour::~CudaDetour() {
  // Twice: where asking itself failed, copies may still be under way. Memory that they may use is leaked.
  const bool has_ended = copies_.end() || copies_.end();
  const CudaContext::Scope scope(*neighbour_, std::nothrow);
  if (staging_ != 0 && has_ended) neighbour_->api().memory_free(staging_);
}

void CudaDetour::stage(const std::byte* slots, std::size_t nbytes) {
  const CudaContext::Scope scope(*neighbour_);
  const CudaApi& api = neighbour_->api();
  api.check(api.memory_allocate(&staging_, nbytes), "cuMemAlloc");
  slots_ = slots;
}

// Of torch's segments that can grow, and of pools, access is given by each device's own entry.
bool CudaDetour::reaches(Address to) const {
  const CudaContext::Scope scope(*neighbour_);
  int access = 0;
  const CuResult result = neighbour_->api().pointer_get_attribute(&access, kPointerAccessFlags, to);
  return result == 0 && access == kReadWrite;
}

// The slot's place in staging is free as long as the slot is: both are given back by the same event.
void CudaDetour::copy(Address to, const std::byte* from, std::size_t nbytes) {
  const CuDevicePtr staged = staging_ + static_cast<std::size_t>(from - slots_);
  copies_.copy(staged, from, nbytes);
  const CudaContext::Scope scope(*neighbour_);
  const CudaApi& api = neighbour_->api();
  api.check(api.memcpy_on_device_async(to, staged, nbytes, copies_.stream()), "cuMemcpyDtoDAsync");
}

}  // namespace pyint8
