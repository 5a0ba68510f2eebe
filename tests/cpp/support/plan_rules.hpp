// What every plan keeps to, whatever it is of.
#pragma once

#include <span>
#include <string>

#include "transfer/plan.hpp"

namespace pyint8::testing {

// The first rule that the plan of these ranges breaks, or nothing. Its segments, in order, must be the
// ranges' bytes, in order: each exactly once.
std::string broken_by_plan(std::span<const Range> ranges, const PlanLimits& limits);

}  // namespace pyint8::testing
