package cli

import (
	"math/bits"
	"strings"

	"github.com/spf13/cobra"

	"github.com/atollstore/atoll/internal/rbdstream"
)

// features are rbd's names of an image's features, by bit.
var features = []string{"layering", "striping", "exclusive-lock", "object-map", "fast-diff", "deep-flatten", "journaling", "data-pool"}

// featureStriping is set when an image's stripes are not its objects.
const featureStriping = 1 << 1

// layoutFlags are rbd's flags of how an image lies in objects. It is kept for
// exports and has no meaning for how volumes are stored.
type layoutFlags struct {
	objectSize, stripeUnit string
	order                  uint64
	stripeCount            uint64
	features               []string
}

func (l *layoutFlags) add(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&l.objectSize, "object-size", "", "size of rbd's objects, kept for exports, 4K to 32M")
	f.Uint64Var(&l.order, "order", 0, "log2 of the object size, 12 to 25")
	f.StringVar(&l.stripeUnit, "stripe-unit", "", "rbd's stripe unit, kept for exports")
	f.Uint64Var(&l.stripeCount, "stripe-count", 0, "rbd's stripe count, kept for exports")
	f.StringSliceVar(&l.features, "image-feature", nil, "rbd's features, kept for exports")
	for _, name := range []string{"object-size", "order", "stripe-unit", "stripe-count", "image-feature"} {
		_ = f.MarkHidden(name) // fails only for a flag that is not there
	}
}

// override returns what changes a header as the flags say; nil without flags.
func (l *layoutFlags) override() (func(*rbdstream.Header), error) {
	if l.objectSize == "" && l.order == 0 && l.stripeUnit == "" && l.stripeCount == 0 && len(l.features) == 0 {
		return nil, nil
	}
	order, unit := l.order, int64(0)
	if l.objectSize != "" {
		n, err := parseSize(l.objectSize)
		if err != nil || n < 4096 || n > 32<<20 {
			return nil, usagef("--object-size %s: want 4K to 32M", l.objectSize)
		}
		order = uint64(bits.Len64(uint64(n - 1)))
	}
	if order != 0 && (order < 12 || order > 25) {
		return nil, usagef("--order %d: want 12 to 25", order)
	}
	if l.stripeUnit != "" {
		n, err := parseSize(l.stripeUnit)
		if err != nil || n <= 0 {
			return nil, usagef("--stripe-unit %s: want a size", l.stripeUnit)
		}
		unit = n
	}
	if (unit == 0) != (l.stripeCount == 0) {
		return nil, usagef("--stripe-unit and --stripe-count go together")
	}
	mask, err := featureMask(l.features)
	if err != nil {
		return nil, err
	}
	count := l.stripeCount
	check := rbdstream.DefaultHeader()
	apply := func(h *rbdstream.Header) { setLayout(h, order, uint64(unit), count, mask) }
	if apply(&check); unit > 0 && check.ObjectSize()%unit != 0 {
		return nil, usagef("--stripe-unit %s does not divide the object size", l.stripeUnit)
	}
	return apply, nil
}

// setLayout changes what is not zero.
func setLayout(h *rbdstream.Header, order, unit, count, mask uint64) {
	if h.Has&rbdstream.HasFeatures == 0 {
		h.Features = rbdstream.DefaultFeatures
	}
	if mask != 0 {
		h.Features = mask | h.Features&featureStriping
	}
	if order != 0 {
		if h.StripeUnit == uint64(h.ObjectSize()) {
			h.StripeUnit = 1 << order
		}
		h.Order = order
		h.Has |= rbdstream.HasOrder
	}
	if unit != 0 {
		h.StripeUnit, h.StripeCount = unit, count
		h.Has |= rbdstream.HasStripeUnit | rbdstream.HasStripeCount
		if h.Features |= featureStriping; unit == uint64(h.ObjectSize()) && count == 1 {
			h.Features &^= featureStriping
		}
	}
	h.Has |= rbdstream.HasFeatures
}

// featureMask turns names of features, also in lists with commas, into bits.
func featureMask(names []string) (mask uint64, err error) {
	for _, list := range names {
		for _, name := range strings.Split(list, ",") {
			bit := -1
			for i, f := range features {
				if f == name {
					bit = i
				}
			}
			if bit < 0 {
				return 0, usagef("unknown feature %q", name)
			}
			mask |= 1 << bit
		}
	}
	return mask, nil
}

// featureNames is the inverse of featureMask.
func featureNames(mask uint64) []string {
	out := []string{}
	for i, f := range features {
		if mask&(1<<i) != 0 {
			out = append(out, f)
		}
	}
	return out
}
