package curve

import (
	"context"

	"github.com/atollstore/atoll/internal/api/atollv1"
)

// throttle sets one of Curve's six limits of a volume; a limit of 0 removes it.
func (g *Gateway) throttle(ctx context.Context, in *call, _ *reply) error {
	n, err := g.enterFile(ctx, in)
	if err != nil {
		return err
	}
	if n.dir() || n.trash != nil {
		return refuse(NotSupport, in.Path+" is not a volume")
	}
	if in.Limit < 0 || in.Burst < 0 || in.BurstLength < 0 || in.Burst != 0 && in.Burst < in.Limit {
		return refuse(ParamError, "want a limit, and a burst of at least that")
	}
	l := &atollv1.Limit{Rate: in.Limit, Burst: in.Burst, BurstSeconds: in.BurstLength}
	limits := &atollv1.Limits{}
	switch in.Throttle {
	case "IOPS_TOTAL":
		limits.Iops = l
	case "IOPS_READ":
		limits.ReadIops = l
	case "IOPS_WRITE":
		limits.WriteIops = l
	case "BPS_TOTAL":
		limits.Bytes = l
	case "BPS_READ":
		limits.ReadBytes = l
	case "BPS_WRITE":
		limits.WriteBytes = l
	default:
		return refuse(ParamError, "unknown throttle "+in.Throttle+"; want IOPS_ or BPS_ with TOTAL, READ or WRITE")
	}
	_, err = g.b.SetLimits(ctx, &atollv1.SetLimitsRequest{Name: n.path, Limits: limits})
	return err
}

// defaultLimits are those that Curve gives a volume by its length: 30 operations
// and 0.3 MB a second for each GB, within bounds.
func defaultLimits(length uint64) *atollv1.Limits {
	const mb = 1 << 20
	gb := int64(length >> 30)
	return &atollv1.Limits{
		Iops:  &atollv1.Limit{Rate: min(max(30*gb, 2000), 26000)},
		Bytes: &atollv1.Limit{Rate: min(max(3*gb*mb/10, 120*mb), 260*mb)},
	}
}
