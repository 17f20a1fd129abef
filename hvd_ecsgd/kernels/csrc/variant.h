// All kernels, in the namespace and instructions of one variant: kernels.cpp includes this once for each.
#include "lanes.h"

#include "whole_tensors.h"

#include "draws.h"

#include "decode.h"

#include "sign.h"

#include "ternary.h"

#include "positions.h"

#include "move.h"

#include "top_k.h"

#include "block_top_k.h"

#include "threshold.h"

#include "random_k.h"

#include "qsgd.h"

#include "natural.h"

#include "cast.h"

#include "accumulate.h"

#include "from_gradients.h"

#include "shift.h"

#include "low_rank.h"
