// All kernels of one instruction set: the includer has set RESNEXT_LANES, RESNEXT_REGISTERS and the target pragma, and
// has opened a namespace of its own.
#include "simd.inl.h"
// (the order matters: each part uses those before it)
#include "maps.inl.h"
#include "moments.inl.h"
#include "rows.inl.h"
#include "layout.inl.h"
#include "amx.inl.h"
#include "amx_correlate.inl.h"
#include "correlate.inl.h"
#include "wgrad.inl.h"
#include "amx_wgrad.inl.h"
#include "pointwise.inl.h"
#include "winograd.inl.h"
#include "elementwise.inl.h"
#include "max_pool.inl.h"
#include "layout_change.inl.h"

#define RESNEXT_KERNELS(name, pairs, amx)                                                              \
  {                                                                                                    \
    name, pairs, amx, make_layout, packed_weight_size, packed_bias_size, weight_scratch, pack_weight,  \
        correlate_scratch, correlate, wgrad_slice_size, wgrad_scratch, wgrad, reduce_wgrad,            \
        pack_matrix, product_scratch, multiply, gradient_slice_size, gradient_scratch, pixel_gradient, \
        reduce_gradient, make_tile_layout, tile_weight_size, tile_weight_scratch, pack_tile_weights,   \
        tile_product_scratch, multiply_tiles, tile_gradient_slice, tile_gradient_scratch,              \
        tile_gradient, store_tile_gradient, elementwise, max_pool_scratch, max_pool,                   \
        max_pool_gradient_scratch, max_pool_gradient, layout_change_scratch, change_layout             \
  }
