package curve

import "fmt"

// The geometry that Curve's clients are told and held to.
const (
	blockBytes   = 4 << 10
	chunkBytes   = 16 << 20
	segmentBytes = 1 << 30
)

// Sizes are the lengths that a volume may have.
type Sizes struct {
	Min, Max, Unit uint64
}

// CurveSizes are those of a Curve cluster as it is shipped: 10 GiB to 20 TiB in
// steps of 1 GiB.
func CurveSizes() Sizes { return Sizes{Min: 10 << 30, Max: 20 << 40, Unit: segmentBytes} }

// AnySizes are all that Atoll can do in whole blocks.
func AnySizes() Sizes { return Sizes{Min: blockBytes, Max: 1 << 50, Unit: blockBytes} }

// check refuses the length of a new volume.
func (s Sizes) check(n uint64) error {
	if n < s.Min || n > s.Max || n%s.Unit != 0 {
		return refuse(LengthNotSupport, fmt.Sprintf("length %d: want %d to %d in steps of %d", n, s.Min, s.Max, s.Unit))
	}
	return nil
}

// checkStripe refuses what Curve would: stripes are kept and told again, but do
// not change where data lie.
func checkStripe(unit, count uint64) error {
	bad := func(why string) error {
		return refuse(ParamError, fmt.Sprintf("stripe unit %d, count %d: %s", unit, count, why))
	}
	switch {
	case unit == 0 && count == 0:
		return nil
	case unit == 0 || count == 0:
		return bad("one of them is missing")
	case unit > chunkBytes:
		return bad("the unit is larger than a chunk")
	case chunkBytes%unit != 0:
		return bad("the unit does not divide a chunk")
	case chunkBytes%count != 0:
		return bad("the count does not divide a chunk")
	case unit%blockBytes != 0:
		return bad("the unit is not in whole blocks")
	case count > segmentBytes/chunkBytes:
		return bad("the count is larger than a segment has chunks")
	case count == 1 && unit != chunkBytes:
		return bad("one stripe must be a chunk")
	}
	return nil
}
