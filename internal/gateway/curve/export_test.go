package curve

// ForgetMounts makes the gateway forget who opened what.
func (g *Gateway) ForgetMounts() { g.mounts.init() }

// ForgetUsers makes the gateway read the list of users again.
func (g *Gateway) ForgetUsers() { g.users.mu.list = nil }

// PackUUID and UnpackUUID are for tests.
var (
	PackUUID   = packUUID
	UnpackUUID = unpackUUID
)
